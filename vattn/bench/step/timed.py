"""Timing steps: the time of each, and what of it the driver took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import vattn
from vattn.bench.common import NothingMeasured


@dataclass
class Steps:
    """What timed steps took, one entry for each in every list.

    Attributes
    ----------
    ns : list of int
        Nanoseconds of the whole ``step()``.
    driver_ns : list of int
        Of them, nanoseconds in driver calls: the map time on the critical path.
    n_calls : list of int
        Driver calls in it.
    calls : Counter
        Driver calls of all steps together, by name.
    """

    ns: list[int] = field(default_factory=list)
    driver_ns: list[int] = field(default_factory=list)
    n_calls: list[int] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def step(self, cache: vattn.KVCache, seq_lens: Any) -> None:
        """Call ``cache.step(seq_lens)``, one clock around it, and note what it did."""
        before = cache.stats()
        start = time.perf_counter_ns()
        cache.step(seq_lens)
        self.ns.append(time.perf_counter_ns() - start)
        after = cache.stats()
        if after.steps != before.steps + 1:
            raise NothingMeasured(f"step() was counted {after.steps - before.steps} times, not 1")
        self.driver_ns.append(step_ns(after) - step_ns(before))
        self.n_calls.append(after.calls("step") - before.calls("step"))
        if self.n_calls[-1]:
            was = before.driver_calls["step"]
            for name, now in after.driver_calls["step"].items():
                if delta := now.count - (was[name].count if name in was else 0):
                    self.calls[name] += delta

    @property
    def growing(self) -> Steps:
        """Those steps that called the driver."""
        at = [i for i, n in enumerate(self.n_calls) if n]
        return Steps(
            ns=[self.ns[i] for i in at],
            driver_ns=[self.driver_ns[i] for i in at],
            n_calls=[self.n_calls[i] for i in at],
            calls=self.calls,
        )


def step_ns(stats: vattn.CacheStats) -> int:
    """Nanoseconds in driver calls made by ``step()`` so far."""
    return sum(call.total_ns for call in stats.driver_calls["step"].values())


def repetitions(seconds: float, least: int, most: int) -> Iterator[int]:
    """Count up while there is time left, ``least`` to ``most`` times."""
    end = time.monotonic() + seconds
    for i in range(most):
        if i >= least and time.monotonic() > end:
            return
        yield i


def wait_until_quiet(cache: vattn.KVCache, *, limit_s: float = 20.0) -> None:
    """Return when the background thread has mapped what it can, and given back what it should."""
    end = time.monotonic() + limit_s
    seen = -1
    while seen != (now := cache.stats().calls("background")):
        if time.monotonic() > end:
            raise NothingMeasured(f"the background thread was still busy after {limit_s:g} s")
        seen = now
        time.sleep(0.02)


def give_back(cache: vattn.KVCache) -> None:
    """Release all memory of rows that are not active; on a GPU once their fences have passed."""
    cache.trim()
    while cache.stats().held_bytes:
        time.sleep(0.001)
        cache.trim()
