"""The same calls while compute runs and while none does."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, NothingMeasured
from vattn.bench.latency import floors
from vattn.bench.latency.calls import (
    MIB,
    ONE_HANDLE,
    POPULATED,
    RawCycle,
    kind_of,
    repeat,
)
from vattn.bench.latency.raw import RawVmm

STATES = ("idle", "computing")
SIZES = (2 * MIB, 32 * MIB)
WORK_MS = 30.0  # of kernels in flight at each cycle on CUDA: many times what the calls take
PATIENCE_S = 10.0  # with a thread that gets no core
CAPTION = (
    "Ratio of medians. On CUDA a call that waits for the device takes as long as the kernels that "
    f"were in flight, {WORK_MS:g} ms; on the host the ratio is what a second core's work costs."
)


class Work(Protocol):
    """Compute in the background, in the same process as the calls."""

    in_flight_ns: float  # what a call that waits for the work takes, about

    def __enter__(self) -> Work: ...
    def __exit__(self, *error: object) -> None: ...

    def start(self) -> None:
        """Be at work from here on."""

    def still_running(self) -> bool:
        """Whether it has been at work since ``start``, and is so now."""

    def wait(self) -> None:
        """Wait for the end of what was begun. Raises NothingMeasured if nothing was."""


class HostWork:
    """A thread that multiplies matrices on one core. It shares the address space with the calls."""

    in_flight_ns = math.inf  # no call on the host waits for a computation

    def __init__(self) -> None:
        self._products = self._before = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._multiply, name="compute", daemon=True)

    def _multiply(self) -> None:
        a, product = torch.ones(256, 256), torch.empty(256, 256)
        while not self._stop.is_set():
            torch.mm(a, a, out=product)
            self._products += 1

    def __enter__(self) -> HostWork:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._thread.start()
        try:
            self.wait()
        except NothingMeasured:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        torch.set_num_threads(self._threads)

    def start(self) -> None:
        self._before = self._products

    def still_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._products == self._before:
            if time.monotonic() > deadline:
                raise NothingMeasured("nothing was computed while the calls were made")
            time.sleep(0)  # asleep, this core would be slower at the next cycle


def _event(*, timing: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


class CudaWork:
    """Kernels on a stream of their own, enqueued before each cycle."""

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.Stream(torch.device(device))  # type: ignore[no-untyped-call]
        self._a = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
        self._product = torch.empty_like(self._a)
        self._event = _event(timing=False)
        torch.cuda.synchronize(device)
        self._count = 10
        self.start()  # the first loads the kernel
        self.wait()
        begin, end = _event(timing=True), _event(timing=True)
        begin.record(self._stream)
        self.start()
        end.record(self._stream)
        self.wait()
        # The queue of a stream holds about a thousand launches; more would wait in start().
        self._count = min(500, max(10, math.ceil(10 * WORK_MS / begin.elapsed_time(end))))
        self.in_flight_ns = self._count / 10 * begin.elapsed_time(end) * 1e6

    def __enter__(self) -> CudaWork:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def start(self) -> None:
        with torch.cuda.stream(self._stream):
            for _ in range(self._count):
                torch.mm(self._a, self._a, out=self._product)
            self._event.record()

    def still_running(self) -> bool:
        return not self._event.query()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._stream.synchronize()


def open_work(device: str) -> Work:
    """Compute for the kind of device."""
    return HostWork() if kind_of(device) == "cpu" else CudaWork(device)


def _cycle_beside(work: Work, cycle: RawCycle, waited: dict[str, int]) -> None:
    """Make one cycle of calls while the work runs; counts calls that waited for it."""
    work.start()
    cycle.once()
    if not work.still_running():
        # Either a call waited until the kernels were done, which its sample shows, or the work was
        # too short, and what was measured is not what the figure is named for.
        slowest = max(cycle.samples, key=lambda call: cycle.samples[call][-1])
        if cycle.samples[slowest][-1] < work.in_flight_ns / 2:
            raise NothingMeasured("the compute in the background ended before the calls did")
        waited[slowest] += 1
    work.wait()


def measure(
    device: str,
    raw: RawVmm,
    n: int,
    *,
    work: Work,
    sizes: Sequence[int] = SIZES,
    budget_s: float = 3.0,
) -> list[Measurement]:
    """Make the same calls with the device, or another core, idle and at work.

    Expected: create, map and set_access do not wait for kernels. On the host, unmapping interrupts
    the other core, as it may hold addresses that become invalid.
    """
    manner = POPULATED if kind_of(device) == "cpu" else ONE_HANDLE
    found: dict[tuple[int, str], RawCycle] = {}
    waited: dict[int, dict[str, int]] = {}
    for size in common.progress(list(sizes), "without compute"):
        found[size, STATES[0]] = RawCycle(raw, size, manner)
        repeat(found[size, STATES[0]].once, n, budget_s)
    with work:
        for size in common.progress(list(sizes), "beside compute"):
            cycle = found[size, STATES[1]] = RawCycle(raw, size, manner)
            counts = waited[size] = defaultdict(int)
            repeat(partial(_cycle_beside, work, cycle, counts), n, budget_s)
    return [
        Measurement(
            name=f"compute/raw/{manner.name}/{size}/{state}/{call}",
            what=f"{call} of {size} bytes, {state}",
            ns=Distribution.of(ns),
            calls=_calls(call, cycle, waited[size] if state == STATES[1] else {}),
            limit=_limit(f"compute/raw/{manner.name}/{size}", state, call),
        )
        for (size, state), cycle in found.items()
        for call, ns in cycle.samples.items()
        if cycle.counts[call]
    ]


def _calls(call: str, cycle: RawCycle, waited: dict[str, int]) -> dict[str, int]:
    calls = {call: cycle.counts[call]}
    return calls | ({"waited for the device": waited[call]} if waited.get(call) else {})


def _limit(path: str, state: str, call: str) -> str:
    return floors.CALL if state == STATES[0] else f"{path}/{STATES[0]}/{call}"
