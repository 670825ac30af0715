"""Part ``fork``: a fork of a row, beside copying all its tokens, and what reading them first costs.

The copy is as fast as copies go: the whole row in one piece for each region, by as many threads as
torch has, between memory that is mapped and faulted in. The fork takes a free row. A child that is
freed becomes one on the background thread, which is waited for before the next fork.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import vattn
from benchmarks.hf_generate.memory import no_room
from benchmarks.hf_generate.results import Part
from benchmarks.sharing import shapes
from benchmarks.sharing.calls import CallWatch
from benchmarks.sharing.memory import flat_row, touch
from benchmarks.sharing.shapes import MIB, PAGE_TOKENS, TOKEN_BYTES, make_cache, tokens_name
from vattn.bench.common import (
    Distribution,
    Measurement,
    NothingMeasured,
    at_least,
    expect_calls,
    progress,
    time_calls,
)
from vattn.bench.step.floor import MapFloor
from vattn.pool import DEFAULT_MAX_EXTENT_BYTES
from vattn.testing import settle

GOAL = 50.0
GOAL_TOKENS = 32768
EXTENT_TOKENS = DEFAULT_MAX_EXTENT_BYTES // TOKEN_BYTES
FLOOR_PAGE = 64 * 1024

# What the row's tokens end in.
ENDS = {
    "page": "ends with a page",
    "in_page": "ends one token before a page does",
    "in_extent": "the same, and all of its memory came in super-pages",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    tokens: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    layouts: tuple[str, ...] = shapes.LAYOUTS
    forks: int = 100
    copies: int = 8
    touches: int = 5
    probe_bytes: int = 256 * MIB


@dataclass(frozen=True)
class Case:
    """A row to fork."""

    layout: str
    size: int  # tokens, roughly
    end: str

    @property
    def tokens(self) -> int:
        """Length of the row."""
        if self.end == "in_page":
            # One page less than the super-pages have, so that the last ones are single.
            return self.size - PAGE_TOKENS - 1
        return self.size - (self.end == "in_extent")

    @property
    def name(self) -> str:
        """Name of its measurements."""
        return f"fork/{self.layout}/{self.size}/{self.end}"

    def __str__(self) -> str:
        return f"{tokens_name(self.size)}, {self.layout}, {ENDS[self.end]}"


@dataclass
class Found:
    """Nanoseconds, and what the work was."""

    fork: list[int]
    copy: list[int]
    first_read: list[int]
    second_read: list[int]
    calls: Counter[str]
    aliased_bytes: int


def measure(sizes: Sizes) -> Part:
    """Measure each length in each layout, as far as memory goes."""
    part = Part()
    memory = _memcpy(sizes)
    part.measurements.append(memory)
    bytes_per_ns = sizes.probe_bytes / memory.ns.median
    for case in progress(list(_cases(sizes)), "forking and copying rows"):
        needed = 2 * case.size * TOKEN_BYTES + sizes.probe_bytes
        reason = no_room(needed, "cpu")
        if reason:
            part.miss(case.name, "skipped", reason)
            continue
        _summarize(part, case, _measure(case, sizes), bytes_per_ns)
    return part


def _cases(sizes: Sizes) -> Iterator[Case]:
    for layout in sizes.layouts:
        for tokens in sizes.tokens:
            for end in ENDS:
                yield Case(layout, tokens, end)


def _memcpy(sizes: Sizes) -> Measurement:
    """Copy between two tensors of torch's: what copying can be."""
    source = torch.ones(sizes.probe_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    samples = time_calls(target.copy_, [source], sizes.copies + 1)[1:]
    what = f"copy {sizes.probe_bytes // MIB} MiB of plain memory"
    return Measurement(name="fork/memcpy", what=what, ns=Distribution.of(samples))


def _measure(case: Case, sizes: Sizes) -> Found:
    # Room for two rows, and for what a fork copies: an extent at the most.
    memory = (2 * case.size + EXTENT_TOKENS) * TOKEN_BYTES
    cache = make_cache(case.layout, rows=3, tokens=case.size + PAGE_TOKENS, memory=memory)
    with cache:
        parent, target = cache.alloc(), cache.alloc()
        for row in (parent, target):
            cache.step({row: case.tokens})
            for view in flat_row(cache, row, case.tokens):
                view.fill_(row + 1)  # faults it in
        copy = _copies(cache, parent, target, case, sizes.copies)
        found = _forks(cache, parent, case, sizes)
        found.copy = copy
        cache.check()
    return found


def _copies(cache: vattn.KVCache, parent: int, target: int, case: Case, n: int) -> list[int]:
    pairs = list(
        zip(
            flat_row(cache, target, case.tokens),
            flat_row(cache, parent, case.tokens),
            strict=True,
        )
    )

    def copy(_: None) -> None:
        for to, origin in pairs:
            to.copy_(origin)

    samples = time_calls(copy, [None], n + 1)[1:]  # the first one warms up
    if not all(to.equal(origin) for to, origin in pairs):
        raise NothingMeasured(f"{case}: the copy does not hold what was copied")
    return samples


def _forks(cache: vattn.KVCache, parent: int, case: Case, sizes: Sizes) -> Found:
    _free(cache, cache.fork(parent)[0])
    fork, calls, aliased = [], Counter[str](), 0
    watch = CallWatch(cache)
    for _ in range(sizes.forks):
        start = time.perf_counter_ns()
        (child,) = cache.fork(parent)
        fork.append(time.perf_counter_ns() - start)
        calls = watch.look()
        aliased = _check_fork(cache, child, case, calls)
        _free(cache, child)
        watch.look()
    first: list[int] = []
    second: list[int] = []
    for _ in range(sizes.touches):
        (child,) = cache.fork(parent)
        views = flat_row(cache, child, case.tokens)
        for samples in (first, second):
            samples += time_calls(touch, [views], 1)
        _free(cache, child)
    (child,) = cache.fork(parent)
    same = zip(
        flat_row(cache, child, case.tokens), flat_row(cache, parent, case.tokens), strict=True
    )
    if not all(a.equal(b) for a, b in same):
        raise NothingMeasured(f"{case}: the child does not read what the parent has")
    return Found(fork, [], first, second, calls, aliased)


def _free(cache: vattn.KVCache, row: int) -> None:
    """End a child, and wait until the background thread has taken its memory out."""
    cache.free(row)
    settle(cache)


def _check_fork(cache: vattn.KVCache, child: int, case: Case, calls: Counter[str]) -> int:
    """Return the bytes that the child reads of the parent; no figure without the work."""
    expect_calls(cache.seq_lens[child], case.tokens, f"{case}: tokens of the child")
    if calls["map"] == 0:
        raise NothingMeasured(f"{case}: a fork without a map call has mapped nothing")
    aliased = cache.stats().aliased_bytes
    if aliased == 0:
        raise NothingMeasured(f"{case}: the child shares no byte with the parent")
    if case.end == "page" and calls["copy"]:
        raise NothingMeasured(f"{case}: {calls['copy']} copies where nothing is partly filled")
    if case.end != "page" and not calls["copy"]:
        raise NothingMeasured(f"{case}: no copy of the partly filled page")
    return aliased


def _summarize(part: Part, case: Case, found: Found, bytes_per_ns: float) -> None:
    n_bytes = case.tokens * TOKEN_BYTES
    copied_bytes = n_bytes - found.aliased_bytes
    mmaps = found.calls["map"] + found.calls["unmap"]  # either is an mmap on the host
    run_bytes = n_bytes // found.calls["map"] // FLOOR_PAGE * FLOOR_PAGE
    floor = MapFloor(mmaps, max(run_bytes, FLOOR_PAGE))
    for _ in range(len(found.fork)):
        floor.once()
    floor.close()
    copied_ns = [ns + copied_bytes / bytes_per_ns for ns in floor.ns]
    memcpy_ns = [n_bytes / bytes_per_ns]
    lines: dict[str, tuple[str, list[Any], str | None]] = {
        "limit": (f"{mmaps} mmap of as many bytes, and memcpy of what is copied", copied_ns, None),
        "memcpy": ("memcpy at the speed of plain memory", memcpy_ns, None),
        "fork": ("fork", found.fork, "limit"),
        "copy": ("copy into memory that is there", found.copy, "memcpy"),
        "first_read": ("first read of the child, a byte in 4 KiB", found.first_read, None),
        "second_read": ("the same again", found.second_read, None),
    }
    for name, (what, samples, limit) in lines.items():
        part.measurements.append(
            Measurement(
                name=f"{case.name}/{name}",
                what=f"{what}: {case}",
                ns=Distribution.of(samples),
                calls=dict(found.calls) if name == "fork" else {},
                limit=limit and f"{case.name}/{limit}",
            )
        )
    medians = {name: Distribution.of(samples).median for name, (_, samples, _) in lines.items()}
    ratio = medians["copy"] / medians["fork"]
    part.rows.append(
        {
            "name": case.name,
            "layout": case.layout,
            "tokens": case.tokens,
            "size": case.size,
            "end": case.end,
            "bytes": n_bytes,
            "calls": dict(found.calls),
            "copied_bytes": copied_bytes,
            "aliased_bytes": found.aliased_bytes,
            "copy_over_fork": ratio,
            "copy_over_fork_and_first_read": medians["copy"]
            / (medians["fork"] + medians["first_read"] - medians["second_read"]),
            "ns": medians,
        }
    )
    if case.size == GOAL_TOKENS:
        part.targets.append(at_least(f"fork against copy, {case}", ratio, GOAL, "times"))
