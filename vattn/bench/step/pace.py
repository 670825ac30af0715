"""Decoding at a real pace: map time on the critical path, with prefetch and without it.

Where ``decode`` compares two lookaheads beside a busy core, this goes through layouts, numbers of
rows and lookaheads on a machine that does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import vattn
from vattn.bench.common import Distribution, Measurement, NothingMeasured, expect_calls, progress
from vattn.bench.step.floor import MapFloor
from vattn.bench.step.layouts import Geometry, memory_limit, rows_that_fit
from vattn.bench.step.timed import Steps, give_back, wait_until_quiet
from vattn.models import MODELS, ModelShape, uniform

ROWS = (1, 32, 64, 256)
QUICK_ROWS = (1, 8)
LOOKAHEADS = (0, 1, 16, 64)
QUICK_LOOKAHEADS = (0, 16)
STEPS = 240
PAGES = 2  # that every row starts, at least


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model in a layout. ``page_bytes`` None: what the layout takes by default."""

    layout: str
    what: str
    model: ModelShape
    page_bytes: int | None = None

    def config(
        self, device: str, rows: int, tokens: int, memory: int, lookahead: int
    ) -> vattn.CacheConfig:
        """Configure rows of up to ``tokens`` tokens each."""
        return vattn.CacheConfig(
            num_layers=self.model.num_layers,
            layer_groups=self.model.layer_groups,
            dtype="bfloat16",
            max_batch_size=rows,
            max_seq_len=tokens,
            device=device,
            memory=memory,
            layout=self.layout,
            page_bytes=self.page_bytes,
            lookahead=lookahead,
        )


def settings(device: str) -> list[Setting]:
    """List what is decoded with, so that every row starts several pages within a second or two.

    On the host, prefetching touches memory, which takes 0.6 s per GiB and more: a model of 8 KiB a
    token, 16 tokens a page in ``interleaved`` as Llama-3-8B has on pages of 2 MiB. On CUDA that
    model itself; but in ``per_layer`` its pages hold 1,024 tokens, so there a model of four layers
    with 128.
    """
    if device == "cpu":
        small = uniform(
            "4 layers of 8 x 64",
            num_layers=4,
            num_query_heads=8,
            num_kv_heads=8,
            head_dim=64,
            max_seq_len=8192,
        )
        return [
            Setting(layout="interleaved", what=small.name, model=small, page_bytes=128 * 1024),
            Setting(layout="per_layer", what=small.name, model=small),
        ]
    wide = uniform(
        "4 layers of 64 x 128",
        num_layers=4,
        num_query_heads=64,
        num_kv_heads=64,
        head_dim=128,
        max_seq_len=8192,
    )
    llama = MODELS["llama-3-8b"]
    return [
        Setting(layout="interleaved", what=llama.name, model=llama),
        Setting(layout="per_layer", what=wide.name, model=wide),
    ]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What decoding did in one layout, with so many rows and so much lookahead.

    Attributes
    ----------
    step, driver : Distribution
        Nanoseconds of each step, and of the driver calls in it: 0 where it made none.
    driver_ns_per_step : float
        The map time on the critical path: all of it, divided by the steps.
    without_calls_percent : float
        Steps that made no driver call.
    late_steps : int
        Steps that began more than half a period late.
    background_ns : int
        Nanoseconds in the background thread's driver calls, beside the loop.
    """

    layout: str
    model: str
    page_bytes: int
    rows: int
    lookahead: int
    period_ms: float
    steps: int
    step: Distribution
    driver: Distribution
    driver_ns_per_step: float
    without_calls_percent: float
    calls: dict[str, int]
    background_calls: int
    background_ns: int
    late_steps: int

    @property
    def name(self) -> str:
        """Of the measurement."""
        return f"pace_{self.layout}_rows_{self.rows}_lookahead_{self.lookahead}"

    def measurements(self) -> list[Measurement]:
        """As lines of the record."""
        where = f"{self.layout}, {self.rows} rows, lookahead {self.lookahead}"
        what = f"decode, {self.period_ms:g} ms a step: {where}"
        calls = {**self.calls, "steps": self.steps, "in background": self.background_calls}
        return [
            Measurement(
                name=self.name,
                what=what,
                ns=self.step,
                calls=calls,
                limit=f"python_int64_rows_{self.rows}",
            ),
            Measurement(
                name=f"{self.name}_driver",
                what=f"{what}; in driver calls",
                ns=self.driver,
                limit=None if self.lookahead else f"pace_{self.layout}_floor",
            ),
        ]

    def record(self) -> dict[str, Any]:
        """Everything but the distributions, which are measurements."""
        return {k: v for k, v in asdict(self).items() if k not in ("step", "driver")}


def _on_time(n: int, period_s: float, late: list[int]) -> Iterator[int]:
    """Count to ``n``, once a period, as a loop that waits for a device. Notes who was late."""
    at = time.perf_counter()
    for i in range(n):
        at += period_s
        wait = at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        behind = time.perf_counter() - at
        if behind > period_s / 2:
            late.append(i)
            at += behind  # one late step does not hurry the next ones
        yield i


def decode(
    device: str,
    setting: Setting,
    shape: Geometry,
    *,
    rows: int,
    lookahead: int,
    n_steps: int,
    period_s: float,
) -> Pace:
    """Decode one token in every row at each step; the lengths are spread evenly over a page.

    Raises
    ------
    NothingMeasured
        Not all rows grew, or nothing was mapped ahead although there was a lookahead.
    """
    start = 1 + np.arange(rows, dtype=np.int64) * shape.page_tokens // rows
    end = start + n_steps
    tokens = int(end.max()) + lookahead
    memory = rows * shape.row_bytes(tokens)
    steps, late = Steps(), list[int]()
    with vattn.init(setting.config(device, rows, tokens, memory, lookahead)) as cache:
        for _ in range(rows):
            cache.alloc()  # without a length: the prompts' memory stays untouched
        cache.step(start)
        wait_until_quiet(cache)
        before = cache.stats()
        for i in _on_time(n_steps, period_s, late):
            steps.step(cache, start + i + 1)
        wait_until_quiet(cache)
        after = cache.stats()
        if any(cache.mapped_tokens(row) < end[row] for row in range(rows)):
            raise NothingMeasured(f"rows have no memory for the {n_steps} tokens they decoded")
        cache.check()
        for row in range(rows):
            cache.free(row)
        give_back(cache)
    what = f"decoding, {setting.layout}, {rows} rows, lookahead {lookahead}"
    in_background = after.calls("background") - before.calls("background")
    if lookahead and in_background == 0:
        raise NothingMeasured(f"{what}: no page was mapped ahead")
    if not lookahead:
        pages = -(-end // shape.page_tokens) - -(-start // shape.page_tokens)
        expect_calls(steps.calls["map"], shape.regions * int(pages.sum()), f"{what}: map")
    background = [
        sum(call.total_ns for call in stats.driver_calls["background"].values())
        for stats in (before, after)
    ]
    return Pace(
        layout=setting.layout,
        model=setting.what,
        page_bytes=shape.page_bytes,
        rows=rows,
        lookahead=lookahead,
        period_ms=period_s * 1e3,
        steps=n_steps,
        step=Distribution.of(steps.ns),
        driver=Distribution.of(steps.driver_ns),
        driver_ns_per_step=sum(steps.driver_ns) / n_steps,
        without_calls_percent=100 * steps.n_calls.count(0) / n_steps,
        calls=dict(sorted(steps.calls.items())),
        background_calls=in_background,
        background_ns=background[1] - background[0],
        late_steps=len(late),
    )


def n_steps_of(shape: Geometry, quick: bool) -> int:
    """Steps that let every row start several pages; one if it is only to be seen to work."""
    return shape.page_tokens if quick else max(STEPS, PAGES * shape.page_tokens)


def measure(device: str, quick: bool, period_s: float) -> tuple[list[Pace], list[Measurement]]:
    """Decode with every number of rows and lookahead, in both layouts.

    Returns what each did, and the floors: one mapping of a page without vattn, on the host.

    Expected: without lookahead the critical path pays ``rows * regions / page_tokens`` mappings a
    step. With it nothing, as long as the background thread maps and touches faster than the rows
    grow; with one token of lookahead it has a single period for each page.
    """
    shapes = {
        setting: Geometry.of(setting.config(device, 1, 1, 2**28, 0)) for setting in settings(device)
    }
    rows_wanted = QUICK_ROWS if quick else ROWS
    lookaheads = QUICK_LOOKAHEADS if quick else LOOKAHEADS
    cases = []
    for setting, shape in shapes.items():
        n_steps = n_steps_of(shape, quick)
        row_bytes = shape.row_bytes(n_steps + shape.page_tokens + max(lookaheads))
        limit = memory_limit(device)
        for rows in rows_wanted:
            # A run with fewer rows would not be the one that is asked for.
            if rows_that_fit(rows, row_bytes, shape.regions, limit) == rows:
                cases += [(setting, shape, rows, lookahead, n_steps) for lookahead in lookaheads]
    floors = []
    for setting, shape in shapes.items() if device == "cpu" else ():
        floor = MapFloor(1, shape.page_bytes)
        for _ in range(10 if quick else 1000):
            floor.once()
        what = f"one mmap of {shape.page_bytes // 1024} KiB through ctypes"
        name = f"pace_{setting.layout}_floor"
        floors.append(Measurement(name=name, what=what, ns=Distribution.of(floor.ns)))
    paces = []
    for setting, shape, rows, lookahead, n_steps in progress(cases, "decoding at a real pace"):
        paces.append(
            decode(
                device,
                setting,
                shape,
                rows=rows,
                lookahead=lookahead,
                n_steps=n_steps,
                period_s=period_s,
            )
        )
    return paces, floors
