"""How rows grow, in every layout: by a prompt, all at once, one after the other, by single tokens.

And the way around it: a prompt on the row of a request that has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

import vattn
from vattn.bench.common import (
    Distribution,
    Measurement,
    NothingMeasured,
    expect_calls,
    progress,
    time_calls,
)
from vattn.bench.step.floor import MapFloor
from vattn.bench.step.layouts import (
    Geometry,
    Variant,
    memory_limit,
    rows_that_fit,
)
from vattn.bench.step.timed import Steps, give_back, repetitions
from vattn.units import format_bytes

PREFILLS = (512, 4096, 32_768)
ROWS = 64  # that cross a page boundary
PAGES_BY_TOKEN, MOST_BY_TOKEN = 4, 4096
# Floors of a repetition, which may have hundreds of steps that grow.
MOST_FLOORS = 20


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Steps of ``stride`` tokens in every row, from the lengths ``start``, shape [rows]."""

    name: str
    what: str
    start: NDArray[np.int64]
    stride: int
    n_steps: int = 1

    def lens(self, step: int) -> NDArray[np.int64]:
        """Lengths after so many steps."""
        return self.start + step * self.stride

    def growing_rows(self, shape: Geometry) -> list[int]:
        """Rows that need more pages, for each step that has such rows."""
        pages = [-(-self.lens(i) // shape.page_tokens) for i in range(self.n_steps + 1)]
        counts = [int((after > before).sum()) for before, after in pairwise(pages)]
        return [count for count in counts if count]


@dataclass(kw_only=True)
class Growth:
    """A pattern of growth in a layout, and what it took.

    Attributes
    ----------
    kind, variant : str
        Short names, which the measurement's name consists of.
    pattern, layout : str
        The two in words.
    rows : int
        Rows that grow.
    ns : list of int
        Nanoseconds of each step.
    calls : dict
        Driver calls in a step; in all of the steps if it names how many.
    driver_ns, floor_ns : list of int
        Nanoseconds of each step in the driver; of as many mappings without vattn, on the host.
    """

    kind: str
    variant: str
    pattern: str
    layout: str
    rows: int
    ns: list[int]
    calls: dict[str, int]
    driver_ns: list[int] = field(default_factory=list)
    floor_ns: list[int] = field(default_factory=list)

    def measurements(self) -> list[Measurement]:
        """As lines of the record. Without a floor, the driver's own time is the limit."""
        name = f"growth_{self.kind}_{self.variant}"
        what = f"grow: {self.pattern}; {self.rows} rows, {self.layout}"
        parts = {
            f"{name}_driver": (f"{what}; in driver calls", self.driver_ns),
            f"{name}_floor": (f"{what}; as many mmap through ctypes", self.floor_ns),
        }
        limits = [part for part, (_, ns) in parts.items() if ns]
        whole = Measurement(
            name=name,
            what=what,
            ns=Distribution.of(self.ns),
            calls=self.calls,
            limit=limits[-1] if limits else None,
        )
        return [whole] + [
            Measurement(name=part, what=text, ns=Distribution.of(ns))
            for part, (text, ns) in parts.items()
            if ns
        ]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One layout on one device, and how long each of its cases is repeated."""

    device: str
    variant: Variant
    shape: Geometry
    seconds: float
    least: int
    most: int

    @classmethod
    def of(cls, device: str, variant: Variant, quick: bool) -> Bench:
        """Look at the layout on the device, and choose the repetitions."""
        shape = Geometry.of(variant.config(device, 1, 1, 2**30))
        # On a GPU thousands of handles are created and released between two samples.
        full = (1.0, 3, 200) if device == "cpu" else (0.5, 2, 200)
        seconds, least, most = (0.0, 1, 1) if quick else full
        return cls(
            device=device, variant=variant, shape=shape, seconds=seconds, least=least, most=most
        )

    @property
    def layout(self) -> str:
        """The layout in words, with its pages."""
        return f"{self.variant.what}, {format_bytes(self.shape.page_bytes)}"

    def cache(self, rows: int, tokens: int) -> vattn.KVCache:
        """Make a cache with memory for ``tokens`` tokens in every row, and addresses for more.

        One growth is behind it: in its first the driver sets itself up.
        """
        memory = rows * self.shape.row_bytes(tokens)
        cache = vattn.init(self.variant.config(self.device, rows, 2 * tokens, memory))
        row = cache.alloc()
        cache.step({row: 1})
        cache.free(row)
        give_back(cache)
        return cache

    def rows(self, wanted: int, tokens: int) -> int:
        """Rows of ``tokens`` tokens that the machine can hold, at most ``wanted``."""
        limit = memory_limit(self.device)
        return rows_that_fit(wanted, self.shape.row_bytes(tokens), self.shape.regions, limit)


def walks(bench: Bench, quick: bool) -> Iterator[Walk]:
    """List the patterns that fit on the machine."""
    page = bench.shape.page_tokens
    for tokens in PREFILLS[:1] if quick else PREFILLS:
        if bench.rows(1, tokens):
            what = f"a prompt of {tokens:,} tokens"
            yield Walk(
                name=f"prefill_{tokens}", what=what, start=np.zeros(1, np.int64), stride=tokens
            )
    rows = bench.rows(2 if quick else ROWS, 2 * page)
    if rows:
        start = np.full(rows, page, np.int64)
        what = "all rows start a page in one step"
        yield Walk(name="together", what=what, start=start, stride=1)
        start = 1 + np.arange(rows, dtype=np.int64) * page // rows
        what = "rows start a page one after the other"
        yield Walk(name="staggered", what=what, start=start, stride=1, n_steps=page)
    n_steps = min((2 if quick else PAGES_BY_TOKEN) * page, MOST_BY_TOKEN)
    if bench.rows(1, n_steps):
        what = "single tokens"
        start = np.zeros(1, np.int64)
        yield Walk(name="by_token", what=what, start=start, stride=1, n_steps=n_steps)


def measure_walk(bench: Bench, walk: Walk) -> list[Growth]:
    """Walk again and again, on memory that has to be created.

    One result for the steps that grow; before it one for all, where there are others.
    """
    shape, end = bench.shape, walk.lens(walk.n_steps)
    growing = walk.growing_rows(shape)
    floor = None
    if bench.device == "cpu":
        floor = MapFloor(shape.regions * growing[0], shape.pages(walk.stride) * shape.page_bytes)
    steps, rounds = Steps(), 0
    with bench.cache(len(end), int(end.max())) as cache:
        for _ in repetitions(bench.seconds, bench.least, bench.most):
            rows = [cache.alloc() for _ in end]
            cache.step(walk.start)
            for i in range(walk.n_steps):
                steps.step(cache, walk.lens(i + 1))
            rounds += 1
            for row in rows:
                cache.free(row)
            give_back(cache)
            for _ in growing[:MOST_FLOORS]:
                if floor:
                    floor.once()
    expected = rounds * shape.regions * sum(growing)
    expect_calls(steps.calls["map"], expected, f"{walk.name}, {bench.layout}: map")
    expect_calls(len(steps.growing.ns), rounds * len(growing), f"{walk.name}: steps that grow")
    return _results(bench, walk, steps, rounds, floor)


def _results(
    bench: Bench, walk: Walk, steps: Steps, rounds: int, floor: MapFloor | None
) -> list[Growth]:
    once = {call: count // rounds for call, count in sorted(steps.calls.items())}
    growing = steps.growing
    only = Growth(
        kind=walk.name,
        variant=bench.variant.name,
        pattern=walk.what,
        layout=bench.layout,
        rows=len(walk.start),
        ns=growing.ns,
        calls=once,
        driver_ns=growing.driver_ns,
        floor_ns=floor.ns if floor else [],
    )
    if walk.n_steps == 1:
        return [only]
    whole = Growth(
        kind=walk.name,
        variant=bench.variant.name,
        pattern=walk.what,
        layout=bench.layout,
        rows=len(walk.start),
        ns=steps.ns,
        calls={"steps": walk.n_steps, **once},
    )
    only.kind += "_growing"
    only.pattern += ": those steps"
    only.calls = {"steps": len(growing.ns) // rounds, **once}
    return [whole, only]


def measure_adoption(bench: Bench, tokens: int) -> list[Growth]:
    """A prompt on an idle row that is long enough: alloc() finds it, and step() has nothing to do.

    Raises
    ------
    NothingMeasured
        Another row was found, or step() called the driver: that would be growth.
    """
    alloc_ns: list[int] = []
    steps = Steps()
    with bench.cache(2, tokens) as cache:
        row = cache.alloc()
        cache.step({row: tokens})
        lens = np.zeros(2, np.int64)
        lens[row] = tokens
        for _ in repetitions(bench.seconds / 4, bench.least, 5 * bench.most):
            cache.free(row)
            if cache.row_state(row) != "idle":
                raise NothingMeasured(f"row {row} is not idle: there is nothing to adopt")
            alloc_ns += time_calls(cache.alloc, [tokens], 1)
            if cache.row_state(row) != "active":
                raise NothingMeasured(f"alloc() did not adopt row {row}")
            steps.step(cache, lens)
        if sum(steps.n_calls) != 0:
            raise NothingMeasured(f"adopting a row made {sum(steps.n_calls)} driver calls, not 0")
        expect_calls(cache.seq_lens[row], tokens, "tokens of the adopted row")
    pattern = f"a prompt of {tokens:,} tokens on an idle row"
    return [
        Growth(
            kind=f"adopt_{tokens}{suffix}",
            variant=bench.variant.name,
            pattern=f"{pattern}{words}",
            layout=bench.layout,
            rows=1,
            ns=ns,
            calls={"create": 0, "map": 0},
        )
        for suffix, words, ns in (("", "", steps.ns), ("_alloc", ": alloc()", alloc_ns))
    ]


def measure(device: str, chosen: Sequence[Variant], quick: bool) -> list[Growth]:
    """Measure every pattern in every layout; what does not fit on the machine is left out.

    Expected: the time follows the driver calls, so ``regions`` times as much for the same tokens in
    a layout of so many regions a row, whatever the bytes; and nothing for a row that is adopted.
    """
    benches = [Bench.of(device, variant, quick) for variant in chosen]
    cases = [(bench, walk) for bench in benches for walk in walks(bench, quick)]
    growths: list[Growth] = []
    for bench, walk in progress(cases, "growth patterns"):
        growths += measure_walk(bench, walk)
    prompts = PREFILLS[:1] if quick else PREFILLS
    adoptions = [(b, tokens) for b in benches for tokens in prompts if b.rows(2, tokens) == 2]
    for bench, tokens in progress(adoptions, "adopting idle rows"):
        growths += measure_adoption(bench, tokens)
    return growths
