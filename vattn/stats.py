"""What a cache can say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CallStats:
    """Calls of one driver function.

    Attributes
    ----------
    count, failed : int
        Calls, and how many of them failed.
    total_ns : int
        Nanoseconds in all calls together.
    histogram : tuple of int
        Entry ``i``: calls that took ``2**i`` to ``2**(i + 1) - 1`` nanoseconds.
    """

    count: int
    failed: int
    total_ns: int
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """A moment in the life of a cache. Units are in the names.

    Attributes
    ----------
    page_bytes : int
        Smallest unit of physical memory.
    budget_bytes : int
        Physical memory that the pool may hold.
    held_bytes : int
        Physical memory that it does hold, mapped or free.
    free_bytes : int
        Held, but mapped nowhere.
    mapped_bytes : int
        Mapped under the rows of this cache; a page that several rows share counts once.
    aliased_bytes : int
        What rows can read beyond ``mapped_bytes``, because others share their pages with them.
    reclaimable_bytes : int
        Of ``mapped_bytes``, what ``step`` may take back for other rows: pages of idle rows, and
        pages beyond the tokens of active ones.
    peak_mapped_bytes : int
        Largest ``held_bytes - free_bytes`` of the pool so far.
    used_bytes : int
        Tokens of active rows, shared ones in each of them. Where nothing is shared, ``used_bytes /
        mapped_bytes`` is the utilisation of what is mapped, ``used_bytes / (mapped_bytes -
        reclaimable_bytes)`` of what other requests cannot have.
    reserved_bytes : int
        Addresses, which cost nothing.
    rows_free, rows_active, rows_idle, rows_retiring : int
        Rows by state. An idle row's request has ended but its memory is still mapped.
    steps, steps_with_growth : int
        Calls of ``step``, and how many of them had to map memory in the caller's time.
    prefetched_runs, prefetch_failures : int
        Runs of pages that the background thread mapped; times that it failed.
    driver_calls : mapping
        ``driver_calls[origin][name]`` is a :class:`CallStats`; origins are "step", "background" and
        "other". Counted per pool.
    """

    page_bytes: int
    budget_bytes: int
    held_bytes: int
    free_bytes: int
    mapped_bytes: int
    aliased_bytes: int
    reclaimable_bytes: int
    peak_mapped_bytes: int
    used_bytes: int
    reserved_bytes: int
    rows_free: int
    rows_active: int
    rows_idle: int
    rows_retiring: int
    steps: int
    steps_with_growth: int
    prefetched_runs: int
    prefetch_failures: int
    driver_calls: Mapping[str, Mapping[str, CallStats]]

    @property
    def available_bytes(self) -> int:
        """Bytes that the next ``step`` can be given: not created yet, free, or reclaimable.

        What admission should compare a request's need with. Other caches of the same pool may take
        some of it first.
        """
        return self.budget_bytes - self.held_bytes + self.free_bytes + self.reclaimable_bytes

    def calls(self, origin: str) -> int:
        """Driver calls of one origin: "step", "background" or "other"."""
        return sum(call.count for call in self.driver_calls[origin].values())
