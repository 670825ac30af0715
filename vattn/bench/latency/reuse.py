"""First use of a handle against re-use: what the memory itself costs, apart from mapping it."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, NothingMeasured
from vattn.bench.latency import floors
from vattn.bench.latency.calls import KIB, MIB, Samples, kind_of, repeat
from vattn.bench.latency.raw import RawVmm
from vattn.units import format_bytes

SIZES = {"cpu": (64 * KIB, 2 * MIB, 32 * MIB), "cuda": (2 * MIB, 32 * MIB, 256 * MIB)}
# In the order in which they happen.
STEPS = {
    "create": "create a handle",
    "map": "map it, access included",
    "touch_fresh": "first write to each page",
    "touch_again": "write again at the same address",
    "remap": "unmap it and map it elsewhere",
    "touch_reused": "write at the new address",
}


class HandleLife:
    """A handle's two places; one sample of each step for each life."""

    def __init__(self, raw: RawVmm, size: int) -> None:
        self.samples: Samples = defaultdict(list)
        self.faults: dict[str, int] = {}
        self._raw, self._size = raw, size

    def _timed(self, step: str, action: Callable[[], Any]) -> Any:
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        start = time.perf_counter_ns()
        result = action()
        self.samples[step].append(time.perf_counter_ns() - start)
        self.faults[step] = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
        return result

    def _map(self, base: int, handle: Any) -> None:
        self._raw.map(base, self._size, handle)
        if self._raw.has_access:
            self._raw.set_access(base, self._size)

    def once(self) -> None:
        """Use a fresh handle at one address, then at another."""
        raw, size = self._raw, self._size
        first, second = raw.reserve(size), raw.reserve(size)
        handle = self._timed("create", lambda: raw.create(size))
        self._timed("map", lambda: self._map(first, handle))
        self._timed("touch_fresh", lambda: raw.touch(first, size))
        self._timed("touch_again", lambda: raw.touch(first, size))

        def remap() -> None:
            raw.unmap(first, size)
            self._map(second, handle)

        self._timed("remap", remap)
        self._timed("touch_reused", lambda: raw.touch(second, size))
        raw.unmap(second, size)
        raw.release(handle, size)
        for base in (first, second):
            raw.free(base, size)


def _limit(size: int, step: str) -> str:
    if not step.startswith("touch"):
        return floors.CALL
    return floors.fill_name(size) if step == "touch_again" else f"reuse/raw/{size}/touch_again"


def measure(
    device: str,
    raw: RawVmm,
    n: int,
    *,
    sizes: Sequence[int] | None = None,
    budget_s: float = 3.0,
) -> list[Measurement]:
    """Follow handles from creation through two addresses.

    Expected: on the host a fresh handle has no memory, so the first write of each page takes a
    fault that finds and clears one. Mapped elsewhere it takes the fault again, but finds the page:
    cheaper. Written again where it is, there is none. On CUDA a handle has its memory from the
    start, and all three cost the same.
    """
    kind = kind_of(device)
    measurements: list[Measurement] = []
    for size in common.progress(list(sizes or SIZES[kind]), "first use and re-use"):
        life = HandleLife(raw, size)
        repeat(life.once, n, budget_s)
        if kind == "cpu" and life.faults["touch_fresh"] <= life.faults["touch_again"]:
            raise NothingMeasured("the first write of a fresh handle took no page fault")
        measurements += [
            Measurement(
                name=f"reuse/raw/{size}/{step}",
                what=f"{format_bytes(size)}: {what}",
                ns=Distribution.of(life.samples[step]),
                calls={"page faults": life.faults[step]} if kind == "cpu" else {},
                limit=_limit(size, step),
            )
            for step, what in STEPS.items()
        ]
    return measurements
