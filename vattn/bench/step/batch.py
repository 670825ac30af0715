"""One ``step()`` with everything mapped against the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vattn import _C
from vattn.bench.common import Distribution, Measurement, expect_calls, progress, time_calls
from vattn.bench.step.steady import TOKENS, mapped_cache

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
QUICK_ROWS = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Sized:
    """Nanoseconds for one number of rows: of step(), and of copying the same bytes."""

    rows: int
    step: Distribution
    copy: Distribution
    empty_call: Distribution  # of all row counts together

    def measurements(self) -> list[Measurement]:
        """As lines of the record. The empty call is there under its own name."""
        return [
            Measurement(
                name=f"python_copyto_rows_{self.rows}",
                what=f"Python: np.copyto of {8 * self.rows} bytes",
                ns=self.copy,
                limit="python_empty_call_rows",
            ),
            Measurement(
                name=f"python_int64_rows_{self.rows}",
                what=f"Python: step(int64), {self.rows} rows, all mapped",
                ns=self.step,
                limit="python_empty_call_rows",
            ),
        ]


def ns_per_row(results: Sequence[Sized]) -> float:
    """What one more row costs: the slope from the fewest rows to the most, by the medians."""
    first, last = results[0], results[-1]
    return (last.step.median - first.step.median) / (last.rows - first.rows)


def measure(device: str, quick: bool) -> list[Sized]:
    """Time ``cache.step(int64 array)`` for each number of rows, and the floor, in turns.

    Expected: that of an empty call, some 0.4 us for the argument and the lock, and 1 to 2 ns a row:
    five arrays are read or written once.
    """
    rounds, per_round = (2, 20) if quick else (40, 250)
    sizes = QUICK_ROWS if quick else ROWS
    random = np.random.default_rng(0)
    caches = {rows: mapped_cache(device, rows) for rows in sizes}
    functions: dict[tuple[str, int], tuple[Any, list[Any]]] = {
        ("empty", 0): (_C.set_log_level, [1])
    }
    for rows, cache in caches.items():
        batches = [random.integers(1, TOKENS, rows).astype(np.int64) for _ in range(8)]
        functions["copy", rows] = (partial(np.copyto, np.zeros(rows, np.int64)), batches)
        functions["step", rows] = (cache.step, batches)
    samples: dict[tuple[str, int], list[int]] = {key: [] for key in functions}
    before = {rows: cache.stats() for rows, cache in caches.items()}
    # In turns, so that what disturbs one disturbs all.
    for _ in progress(range(rounds), "step() against batch size"):
        for key, (function, arguments) in functions.items():
            samples[key] += time_calls(function, arguments, per_round)
    for rows, cache in caches.items():
        after = cache.stats()
        expect_calls(after.steps - before[rows].steps, rounds * per_round, f"step(), {rows} rows")
        if after.calls("step") != before[rows].calls("step"):
            raise RuntimeError(f"a step() with {rows} rows, all mapped, called the driver")
        cache.close()
    empty = Distribution.of(samples["empty", 0])
    return [
        Sized(
            rows=rows,
            step=Distribution.of(samples["step", rows]),
            copy=Distribution.of(samples["copy", rows]),
            empty_call=empty,
        )
        for rows in sizes
    ]


def measurements(results: Sequence[Sized]) -> list[Measurement]:
    """All lines of the record."""
    empty = Measurement(
        name="python_empty_call_rows",
        what="Python: an empty pybind11 call, between the steps",
        ns=results[0].empty_call,
    )
    return [empty, *(line for result in results for line in result.measurements())]
