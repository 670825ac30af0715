"""Part ``window``: physical memory of rows with a sliding window, beside that of full ones.

A token after the other is added to each row. At every length that is noted, the window has been
written and read back, and the kernel says what the file in memory holds (``st_blocks``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vattn
from benchmarks.hf_generate.results import Part
from benchmarks.sharing import shapes
from benchmarks.sharing.memory import physical_bytes
from benchmarks.sharing.shapes import PAGE_TOKENS, TOKEN_BYTES, make_cache
from vattn.bench.common import Distribution, Measurement, NothingMeasured, at_most, progress


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. ``noted`` are lengths, in windows; the first and the last are equal
    in memory, if all is well.
    """

    window: int = 1024
    rows: int = 2
    layouts: tuple[str, ...] = shapes.LAYOUTS
    noted: tuple[int, ...] = (4, 10, 25, 50, 75, 100)


def measure(sizes: Sizes) -> Part:
    """Grow rows with a window and full ones, in each layout."""
    part = Part()
    cases = [(layout, windowed) for layout in sizes.layouts for windowed in (True, False)]
    for layout, windowed in progress(cases, "growing rows"):
        _measure(part, layout, windowed, sizes)
    for layout in sizes.layouts:
        _judge(part, layout, sizes)
    return part


def _measure(part: Part, layout: str, windowed: bool, sizes: Sizes) -> None:
    longest = sizes.noted[-1] * sizes.window
    kept = sizes.window + 4 * PAGE_TOKENS if windowed else longest + PAGE_TOKENS
    more = {"window": sizes.window} if windowed else {}
    kind = "window" if windowed else "full"
    nobody = physical_bytes()
    cache = make_cache(
        layout, rows=sizes.rows, tokens=longest, memory=sizes.rows * kept * TOKEN_BYTES, **more
    )
    samples: list[int] = []
    with cache:
        rows = [cache.alloc() for _ in range(sizes.rows)]
        length = 0
        for windows in sizes.noted:
            samples += _grow(cache, rows, length, windows * sizes.window)
            length = windows * sizes.window
            if windowed:
                _write_and_read(cache, rows, windows)
            stats = cache.stats()
            region_page = cache.page_bytes * cache.regions_per_row
            part.rows.append(
                {
                    "layout": layout,
                    "kind": kind,
                    "rows": sizes.rows,
                    "window": sizes.window,
                    "tokens": length,
                    "mapped_bytes": stats.mapped_bytes,
                    # Nobody has written the full rows, so the kernel has given them nothing.
                    "physical_bytes": physical_bytes() - nobody if windowed else None,
                    "bound_bytes": sizes.rows * (sizes.window * TOKEN_BYTES + region_page),
                    "steps_with_growth": stats.steps_with_growth,
                }
            )
        cache.check()
    what = f"step() of {sizes.rows} rows by a token each, {kind}, {layout}"
    part.measurements.append(
        Measurement(name=f"window/{layout}/{kind}/step", what=what, ns=Distribution.of(samples))
    )


def _grow(cache: vattn.KVCache, rows: Sequence[int], length: int, to: int) -> list[int]:
    """Add tokens one by one, and return the nanoseconds of each step."""
    clock = time.perf_counter_ns
    step = cache.step
    samples = []
    for tokens in range(length + 1, to + 1):
        lengths = dict.fromkeys(rows, tokens)
        start = clock()
        step(lengths)
        samples.append(clock() - start)
    return samples


def _write_and_read(cache: vattn.KVCache, rows: Sequence[int], value: int) -> None:
    """Fill the windows of all rows and layers, then read them back."""
    for write in (True, False):
        for layer in range(cache.config.num_layers):
            for tensor in cache.kv_window(layer, rows=rows):
                assert tensor is not None
                shown, expected = tensor.shape[1], cache.config.window
                if shown != expected:
                    raise NothingMeasured(f"a window shows {shown} tokens, expected {expected}")
                if write:
                    tensor.fill_(value)
                elif not tensor.eq(value).all():
                    raise NothingMeasured(f"layer {layer} does not read what was written")


def _judge(part: Part, layout: str, sizes: Sizes) -> None:
    rows = {
        kind: [row for row in part.rows if (row["layout"], row["kind"]) == (layout, kind)]
        for kind in ("window", "full")
    }
    for kind, of_kind in rows.items():
        if any(row["mapped_bytes"] == 0 for row in of_kind):
            raise NothingMeasured(f"{kind} rows of {layout} have no memory")
    first, last = _ends(rows["full"], "mapped_bytes")
    if first >= last:
        raise NothingMeasured(f"full rows of {layout} did not grow: {first} bytes, then {last}")
    spread = f"{sizes.noted[0]}W to {sizes.noted[-1]}W, {layout}"
    for field in ("mapped_bytes", "physical_bytes"):
        of_all = [row[field] for row in rows["window"]]
        part.targets.append(
            at_most(
                f"window: {field}, most of least, {spread}", max(of_all) / min(of_all), 1, "times"
            )
        )
    bytes_over_bound = rows["window"][-1]["mapped_bytes"] / rows["window"][-1]["bound_bytes"]
    bound = f"window: mapped_bytes of a window and a page per region, {layout}"
    part.targets.append(at_most(bound, bytes_over_bound, 1, "times"))


def _ends(rows: Sequence[dict[str, Any]], field: str) -> tuple[int, int]:
    return rows[0][field], rows[-1][field]
