"""Decoding, replayed: every row one token longer at each step, with and without lookahead."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

import vattn
from vattn.bench.common import (
    Distribution,
    Measurement,
    NothingMeasured,
    Target,
    at_least,
    progress,
)

ROWS = 32
LOOKAHEADS = (0, 16)
PERIOD_S, SECONDS = 0.003, 6.0
# One thread of multiplications on one core, as a model's forward pass would be.
CONSUMER = """
import os, sys
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.sched_setaffinity(0, {int(sys.argv[1])})
import numpy as np
a = np.ones((512, 512), np.float32)
print("ready", flush=True)
while os.getppid() != 1:
    a = a @ a * np.float32(1 / 512)
"""


@contextmanager
def busy_core() -> Iterator[int]:
    """Keep one core busy in another process. Yields its number."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", CONSUMER, str(core)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as consumer:
        try:
            assert consumer.stdout is not None
            if consumer.stdout.readline() != "ready\n":
                raise NothingMeasured("the background consumer did not start")
            yield core
            if consumer.poll() is not None:
                raise NothingMeasured("the background consumer ended early")
        finally:
            consumer.terminate()


@dataclass
class Run:
    """What the steps of one cache did."""

    ns: list[int] = field(default_factory=list)
    with_calls: int = 0
    calls: int = 0
    waited: int = 0  # steps that gave up the core, for the lock or in the driver
    preempted: int = 0  # steps that the scheduler took the core from
    background_calls: int = 0

    @property
    def without_calls(self) -> float:
        """Percentage of steps that made no driver call."""
        return 100 * (1 - self.with_calls / len(self.ns))


def _cache(device: str, steps: int, lookahead: int) -> vattn.KVCache:
    """Four layers of 8 heads; on the host, 64 tokens in each page of its eight regions."""
    tokens = 1024 + steps
    config = vattn.CacheConfig(
        num_layers=4,
        num_kv_heads=8,
        head_dim=64,
        dtype="bfloat16",
        max_batch_size=ROWS,
        max_seq_len=tokens,
        device=device,
        memory=ROWS * (tokens + 512) * 8192,
        lookahead=lookahead,
    )
    return vattn.init(config)


def _busy_wait(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _replay(
    device: str, steps: int, period_s: float, wait: Callable[[float], None], what: str
) -> dict[int, Run]:
    """Step one cache for each lookahead in every iteration, so that they share each disturbance."""
    caches = {lookahead: _cache(device, steps, lookahead) for lookahead in LOOKAHEADS}
    runs = {lookahead: Run() for lookahead in LOOKAHEADS}
    lens = np.random.default_rng(0).integers(1, 1000, ROWS).astype(np.int64)
    for cache in caches.values():
        for n in lens:
            cache.alloc(seq_len=int(n))
        cache.step(lens)
    time.sleep(0.5)  # the prompts' own growth is not part of decoding
    for i in progress(range(steps), what):
        lens += 1
        # The first after the wait finds cold memory caches: each in its turn.
        for lookahead in LOOKAHEADS[:: 1 if i % 2 else -1]:
            run, cache = runs[lookahead], caches[lookahead]
            before = cache.stats().calls("step")
            switches = resource.getrusage(resource.RUSAGE_THREAD)
            start = time.perf_counter_ns()
            cache.step(lens)
            run.ns.append(time.perf_counter_ns() - start)
            now = resource.getrusage(resource.RUSAGE_THREAD)
            run.waited += now.ru_nvcsw > switches.ru_nvcsw
            run.preempted += now.ru_nivcsw > switches.ru_nivcsw
            calls = cache.stats().calls("step") - before
            run.calls += calls
            run.with_calls += calls > 0
        wait(period_s)
    for lookahead, cache in caches.items():
        runs[lookahead].background_calls = cache.stats().calls("background")
        cache.check()
        cache.close()
    if runs[0].calls == 0 or runs[LOOKAHEADS[-1]].background_calls == 0:
        raise NothingMeasured("decoding crossed no page: there was nothing to map ahead")
    return runs


def measure(
    device: str, quick: bool, period_s: float = PERIOD_S
) -> tuple[list[Measurement], list[Target]]:
    """Replay decoding while another process keeps one core busy.

    Expected: without lookahead 40% of the steps map, as 1 of 64 tokens of each of 32 rows starts a
    page. With 16 tokens of lookahead the background thread has 16 steps' time for each page.
    """
    # Of the same length at any pace.
    steps = 80 if quick else max(300, min(2000, int(SECONDS / period_s)))
    pace = f"{period_s * 1e3:g} ms a step"
    waits = {
        "waits": (time.sleep, f"the loop sleeps {pace}, as one that waits for a device"),
        "computes": (_busy_wait, f"the loop computes {pace} itself: no core is left over"),
    }
    measurements: list[Measurement] = []
    targets: list[Target] = []
    with busy_core():
        for name, (wait, what) in waits.items():
            runs = _replay(device, steps, period_s, wait, f"decoding, loop {name}")
            for lookahead, run in runs.items():
                calls = {
                    "steps that called the driver": run.with_calls,
                    "calls in step": run.calls,
                    "in background": run.background_calls,
                    "steps that waited": run.waited,
                    "steps that were preempted": run.preempted,
                }
                measurements.append(
                    Measurement(
                        name=f"decode_{name}_lookahead_{lookahead}",
                        what=f"decode: lookahead {lookahead}; {what}",
                        ns=Distribution.of(run.ns),
                        calls=calls,
                        limit="python_int64",
                    )
                )
            share = runs[LOOKAHEADS[-1]].without_calls
            targets.append(at_least(f"decode steps without a call, {name}", share, 99.0, "%"))
    return measurements, targets
