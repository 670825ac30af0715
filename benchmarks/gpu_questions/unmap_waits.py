"""Do unmapping and the other calls wait for kernels that run over other memory?"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.driver import Driver
from benchmarks.gpu_questions.work import DEVICE, Matmuls

ROUNDS = 3
WORK_S = 0.15


def _spin(seconds: float) -> Callable[[], None]:
    """A kernel that runs for about so long and touches no memory."""
    cycles = 100_000_000
    for _ in range(2):  # the first time warms up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    per_s = cycles / begin.elapsed_time(end) * 1000
    return partial(torch.cuda._sleep, int(per_s * seconds))


def _calls(driver: Driver) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each call of the life of a page, in order, over memory that no kernel uses."""
    size = driver.page_bytes
    base, handle = driver.reserve(size), driver.create(size)
    driver.map(base, size, handle)
    yield "cuMemUnmap", lambda: driver.call("cuMemUnmap", base, size)
    yield "cuMemRelease", lambda: driver.call("cuMemRelease", handle)
    made = ctypes.c_uint64()
    yield "cuMemCreate", lambda: setattr(made, "value", driver.create(size))
    yield "cuMemMap", lambda: driver.call("cuMemMap", base, size, 0, made.value, 0)
    yield "cuMemSetAccess", lambda: driver.set_access(base, size)
    driver.call("cuMemUnmap", base, size)
    driver.call("cuMemRelease", made.value)
    yield "cuMemAddressFree", lambda: driver.call("cuMemAddressFree", base, size)


def _ask_one(enqueue: Callable[[], None], call: Callable[[], object]) -> dict[str, float | bool]:
    """Make one call while work is on the device; says whether the work outlasted it."""
    torch.cuda.synchronize()
    started = torch.cuda.Event()
    done = torch.cuda.Event()
    started.record()
    begin = time.perf_counter()
    enqueue()
    done.record()
    started.synchronize()
    time.sleep(0.005)  # now it runs for certain
    running_before = not done.query()
    called = time.perf_counter()
    call()
    returned = time.perf_counter()
    running_after = not done.query()
    done.synchronize()
    return {
        "call_us": (returned - called) * 1e6,
        "work_left_when_called_ms": (time.perf_counter() - called) * 1e3,
        "work_ms": (time.perf_counter() - begin) * 1e3,
        "running_before": running_before,
        "running_after": running_after,
    }


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Time each call beside a kernel without memory, and beside matrix products."""
    torch.cuda.init()
    driver = Driver()
    torch.zeros(1, device=DEVICE)
    works = {"spinning kernel": _spin(WORK_S), "matrix products": Matmuls(WORK_S).enqueue}
    idle: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, call in _calls(driver):
            begin = time.perf_counter()
            call()
            idle.setdefault(name, []).append((time.perf_counter() - begin) * 1e6)
    evidence.note(idle_us=idle)
    found: dict[str, dict[str, list[dict[str, float | bool]]]] = {}
    for work, enqueue in works.items():
        for _ in range(ROUNDS):
            for name, call in _calls(driver):
                found.setdefault(name, {}).setdefault(work, []).append(_ask_one(enqueue, call))
                evidence.note(busy=found)
    return judge(found)


def judge(found: dict[str, dict[str, list[dict[str, float | bool]]]]) -> tuple[bool | None, str]:
    """Say which calls returned only when the work had ended."""
    waits: dict[str, bool | None] = {}
    for name, by_work in found.items():
        told = [s for samples in by_work.values() for s in samples if s["running_before"]]
        ended = [not s["running_after"] for s in told]
        waits[name] = True if ended and all(ended) else False if ended and not any(ended) else None
    said = "; ".join(
        f"{name} {'waits' if w else 'does not wait' if w is False else 'waits at times'}"
        for name, w in waits.items()
    )
    return waits["cuMemUnmap"], said
