"""The same calls from one thread and from two, which says whether the driver serialises."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, NothingMeasured
from vattn.bench.latency.calls import (
    FEWEST,
    MANY_HANDLES,
    MIB,
    ONE_HANDLE,
    POPULATED,
    Cycle,
    OwnCycle,
    RawCycle,
    Samples,
    kind_of,
)
from vattn.bench.latency.raw import RawVmm

STATES = ("one thread", "two threads")
SIZES = (2 * MIB, 32 * MIB)
ROUNDS = 3  # of one thread and of two in turns, so that both share each disturbance
# On a busy machine the second thread starts late: then the run is repeated, and takes longer.
LEAST_S = (0.05, 0.2, 0.8)
LEAST_OVERLAP = 0.8
CAPTION = (
    "Ratio of medians. 1: a call does not wait for the other thread's; 2 and more: it does. raw "
    "waits for Python's lock too, as its floor shows; vattn's calls are timed without that."
)


class FloorCycle:
    """One call that nobody needs to serialise: what the threads cost each other in Python."""

    def __init__(self, raw: RawVmm) -> None:
        self.samples: Samples = defaultdict(list)
        self.counts = {"floor": 1}
        self._raw = raw

    def once(self) -> None:
        start = time.perf_counter_ns()
        self._raw.floor()
        self.samples["floor"].append(time.perf_counter_ns() - start)

    def close(self) -> None:
        """Holds nothing."""


TimedCycle = Cycle | FloorCycle


def _nothing() -> None:
    pass


def run_at_once(
    actions: Sequence[Callable[[], object]],
    n: int,
    budget_s: float,
    least_s: float,
    attach: Callable[[], None] = _nothing,
) -> tuple[int, float]:
    """Repeat each action in a thread of its own, all from the same moment to the same moment.

    Returns
    -------
    done : int
        How often the slowest was done: at least ``n`` times and for ``least_s``, or fewer if
        ``budget_s`` was spent before.
    overlap : float
        For which part of the time, from the first start to the last end, all of them ran.
    """
    barrier = threading.Barrier(len(actions))
    stop = threading.Event()
    done = [0] * len(actions)
    spans = [(0.0, 0.0)] * len(actions)

    def body(i: int) -> None:
        attach()
        barrier.wait(timeout=60)
        start = time.perf_counter()
        try:
            while not stop.is_set():
                actions[i]()
                done[i] += 1
                elapsed = time.perf_counter() - start
                if elapsed > least_s and min(done) >= (FEWEST if elapsed > budget_s else n):
                    stop.set()
        finally:
            stop.set()  # after an error, too: the other thread would wait for this one
            spans[i] = (start, time.perf_counter())

    with ThreadPoolExecutor(len(actions)) as threads:
        for future in [threads.submit(body, i) for i in range(len(actions))]:
            future.result()
    starts, ends = zip(*spans, strict=True)
    return min(done), (min(ends) - max(starts)) / (max(ends) - min(starts))


def sample_at_once(
    cycles: Sequence[TimedCycle], n: int, budget_s: float, attach: Callable[[], None] = _nothing
) -> int:
    """Fill the samples of each cycle while the others do the same; how many each has.

    Raises
    ------
    NothingMeasured
        The threads did not run at the same time.
    """
    for least_s in LEAST_S:
        for cycle in cycles:
            cycle.samples.clear()
        actions = [cycle.once for cycle in cycles]
        done, overlap = run_at_once(actions, n, budget_s, least_s, attach)
        if overlap >= LEAST_OVERLAP:
            return done
    raise NothingMeasured(f"the threads ran at once for {overlap:.0%} of the time")


def _compare(
    make: Callable[[], TimedCycle], n: int, budget_s: float, attach: Callable[[], None]
) -> tuple[dict[str, Samples], dict[str, int]]:
    """Samples by state and call, and how often a cycle makes each call."""
    found: dict[str, Samples] = {state: defaultdict(list) for state in STATES}
    cycles = [make(), make()]
    try:
        for _ in range(ROUNDS):
            for state, used in zip(STATES, (cycles[:1], cycles), strict=True):
                done = sample_at_once(used, -(-n // ROUNDS), budget_s / ROUNDS / 2, attach)
                for cycle in used:
                    for call, ns in cycle.samples.items():
                        found[state][call] += ns[:done]
    finally:
        for cycle in cycles:
            cycle.close()
    return found, cycles[0].counts


def _makers(
    device: str, raw: RawVmm | None, sizes: Sequence[int]
) -> dict[str, Callable[[], TimedCycle]]:
    makers: dict[str, Callable[[], TimedCycle]] = {}
    kind = kind_of(device)
    if raw:
        floor = "getpid" if kind == "cpu" else "cuDriverGetVersion"
        makers[f"raw/{floor}"] = partial(FloorCycle, raw)
    for size in sizes:
        if raw:
            manner = POPULATED if kind == "cpu" else ONE_HANDLE
            makers[f"raw/{manner.name}/{size}"] = partial(RawCycle, raw, size, manner)
        # Many handles keep the threads in the driver for nearly all of the time.
        many = MANY_HANDLES[kind]
        for manner in (ONE_HANDLE, many) if size > (many.piece or 0) else (ONE_HANDLE,):
            makers[f"vattn/{manner.name}/{size}"] = partial(OwnCycle, device, size, manner)
    return makers


def measure(
    device: str, raw: RawVmm | None, n: int, *, sizes: Sequence[int] = SIZES, budget_s: float = 3.0
) -> list[Measurement]:
    """Make the same calls from one thread, and from two at once, each on a range of its own.

    Expected: on the host, mapping takes turns for the lock of the address space, while page faults
    run side by side as far as the memory allows. On CUDA, whatever the driver does.
    """
    attach = raw.attach if raw else _nothing
    measurements: list[Measurement] = []
    makers = _makers(device, raw, sizes)
    for what in common.progress(list(makers), "one thread and two"):
        found, counts = _compare(makers[what], n, budget_s, attach)
        for state, samples in found.items():
            measurements += [
                Measurement(
                    name=f"threads/{what}/{state}/{call}",
                    what=f"{call}, {what}, {state}",
                    ns=Distribution.of(ns),
                    calls={call: counts[call]},
                    limit=None if state == STATES[0] else f"threads/{what}/{STATES[0]}/{call}",
                )
                for call, ns in samples.items()
                if counts[call]
            ]
    return measurements
