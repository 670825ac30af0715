"""vLLM's OpenAI server as users start it: an API server, the engine's core, and its worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from engine_rounds import environment, transfer_config

from vattn.integrations.vllm import InstanceStatus

START_TIMEOUT_S = 300.0
MODEL = "tiny"


class Server:
    """One server, with the files and the processes that belong to it.

    Parameters
    ----------
    model : Path
        What to serve; its name is ``MODEL``.
    options : dict
        vattn's, as ``kv_connector_extra_config``.
    folder : Path
        An empty one, for the log and, as ``XDG_RUNTIME_DIR``, for the socket.
    """

    def __init__(self, model: Path, options: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.environment = environment(XDG_RUNTIME_DIR=str(folder))
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._log = folder / "log"
        # The command `vllm serve` looks for a package called vllm, and the one for the CPU is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        command += ["--block-size", "32", "--max-num-seqs", "16", "--seed", "0"]
        command += ["--kv-transfer-config", json.dumps(transfer_config(options))]
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_until(self._is_up, START_TIMEOUT_S, self.log)
        except BaseException:
            self.kill()
            raise
        self.family = self._family()

    def log(self) -> str:
        """What all of its processes wrote."""
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> str:
        """Ask for a page."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def vattn(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command ``vattn vllm``, as a user in another terminal."""
        return subprocess.run(
            [sys.executable, "-m", "vattn", "vllm", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def status(self) -> InstanceStatus:
        """Ask ``vattn vllm list`` about the one engine that is running."""
        listed = self.vattn("list", "--json")
        assert listed.returncode == 0, listed.stderr
        (found,) = json.loads(listed.stdout)
        return InstanceStatus(**found)

    def process_called(self, title: str) -> psutil.Process:
        """Find one of its processes by the title that vLLM gives it."""
        found = [p for p in self.family if p.is_running() and title in " ".join(p.cmdline())]
        assert len(found) == 1, f"{found} in {self.family}"
        return found[0]

    def alive(self) -> list[psutil.Process]:
        """Those of its processes that run. One that is dead and waits for its parent does not."""
        self.process.poll()
        return [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def sockets(self) -> list[str]:
        """Names of the sockets in its runtime directory."""
        return sorted(path.name for path in self.folder.rglob("*.sock"))

    def stop(self) -> int:
        """End it as a service manager does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            for child in [*psutil.Process(self.process.pid).children(recursive=True)]:
                _kill(child)
        for process in getattr(self, "family", []):
            _kill(process)
        self.process.kill()
        self.process.wait(30)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            self.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def _family(self) -> list[psutil.Process]:
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]


def wait_until(
    done: Callable[[], bool], timeout_s: float, describe: Callable[[], object] = str
) -> None:
    """Wait for something that another process does.

    Raises
    ------
    AssertionError
        It did not happen; with what ``describe`` says then.
    """
    end = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end, f"nothing after {timeout_s:g} s: {describe()}"
        time.sleep(0.1)


def traces_of_vattn() -> set[str]:
    """What could stay behind outside of the runtime directory: shared memory, and open memfds."""
    found = {str(path) for path in Path("/dev/shm").iterdir() if "vattn" in path.name}
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            fds = list(Path(f"/proc/{process.pid}/fd").iterdir())
            links = {os.readlink(fd) for fd in fds}
        except OSError:  # it ended meanwhile, or is not ours to look at
            continue
        found |= {f"{process.pid}: {link}" for link in links if "memfd:vattn" in link}
    return found


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
