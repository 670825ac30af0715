"""Engines, each in processes of its own, that are asked one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.vllm import memory
from benchmarks.vllm.figures import Times
from benchmarks.vllm.load import Request, as_json
from benchmarks.vllm.model import Shape, block_bytes, engine_arguments
from vattn.bench.common import ROOT, NothingMeasured
from vattn.integrations.vllm.control import status

SAMPLE_S = 0.25
_STOP_S = 30.0


@dataclass(kw_only=True)
class Played:
    """What one load did on one engine. Bytes are what the kernel says is resident."""

    times: Times
    samples: list[tuple[float, int]]  # seconds since the start of the load, bytes
    loaded_bytes: int  # right after the last token
    idle_bytes: int
    counted: dict[str, int] = field(default_factory=dict)  # by vattn, at the same moments

    @property
    def peak_bytes(self) -> int:
        """Most that was seen."""
        return max(self.loaded_bytes, *(size for _, size in self.samples))


class Engine:
    """One engine. Starts at once; ``wait`` until it is ready.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    folder : Path
        Where the model is, and where the log goes.
    shape : Shape
        How it is set up.
    """

    def __init__(self, kind: str, folder: Path, shape: Shape) -> None:
        self.kind = kind
        self.shape = shape
        self.name = f"bench-{os.getpid()}-{kind}"
        self.log = folder / f"{kind}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.vllm.child"],
                cwd=ROOT,
                env=os.environ | shape.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._say(engine_arguments(kind, folder, shape, self.name))
        self.buffer_bytes = 0
        self._worker = 0
        self._files: list[Path] = []

    def wait(self) -> None:
        """Wait until it serves.

        Raises
        ------
        NothingMeasured
            It did not start; the message ends with the end of its log.
        """
        facts = self._hear()
        self.buffer_bytes = facts["num_blocks"] * block_bytes(self.shape)
        self._worker = self._find_worker()
        self._files = memory.files_of_vattn(self._worker)

    def play(self, load: list[Request], *, idle_s: float) -> Played:
        """Serve a load, then wait for ``idle_s`` seconds; watch the memory.

        What is resident is read from smaps before, after the last token and at the end, because
        that takes 30 ms; in between the size of vattn's file is.
        """
        asked = as_json(load)
        samples = [(0.0, self.resident())]
        done = threading.Event()
        start = time.perf_counter()

        def note(size: int) -> int:
            samples.append((time.perf_counter() - start, size))
            return size

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                note(memory.file_bytes(self._files))

        # Stock has no file. Its buffer is filled with zeros when it is made, so nothing changes.
        sampler = threading.Thread(target=sample) if self._files else None
        if sampler:
            sampler.start()
        try:
            self._say(asked)
            answer = self._hear()
            loaded, counted = note(self.resident()), {"loaded": self.counted()}
            time.sleep(idle_s)
        finally:
            done.set()
            if sampler:
                sampler.join()
        idle = note(self.resident())
        counted["idle"] = self.counted()
        return Played(
            times=Times.of(asked, answer["requests"]),
            samples=sorted(samples),  # two threads noted them
            loaded_bytes=loaded,
            idle_bytes=idle,
            counted={} if self.kind == "stock" else counted,
        )

    def resident(self) -> int:
        """Physical bytes under the KV cache, from the kernel."""
        return self._resident(memory.smaps(self._worker))

    def counted(self) -> int:
        """The same, as vattn counts it; 0 for stock."""
        return 0 if self.kind == "stock" else status(self.name).mapped_bytes

    def file_bytes(self) -> int:
        """Physical bytes by the account of vattn's file in memory."""
        return memory.file_bytes(self._files)

    def end(self) -> None:
        """Tell it to end; takes some seconds, see ``stop``."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> None:
        """End all its processes."""
        self.end()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _find_worker(self) -> int:
        for pid in memory.descendants(self._process.pid):
            if self._has_cache(pid):
                return pid
        raise NothingMeasured(f"{self.kind}: no process has {self.buffer_bytes} bytes of KV cache")

    def _has_cache(self, pid: int) -> bool:
        try:
            return self._resident(memory.smaps(pid)) > 0
        except (OSError, ValueError):
            return False  # a process without a buffer so large, or one that has just ended

    def _resident(self, mappings: list[memory.Mapped]) -> int:
        if self.kind == "stock":
            return memory.of_buffer(mappings, self.buffer_bytes)
        return memory.of_vattn(mappings)

    def _say(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            # The reason is in the first process that failed, the last lines are of the last one.
            errors = [e for e in self.log.read_text().splitlines() if "Error: " in e]
            why = " | ".join(errors[:3]) or "see vLLM's log"
            raise NothingMeasured(f"the engine {self.kind} has ended: {why:.1000}")
        heard: dict[str, Any] = json.loads(line)
        return heard
