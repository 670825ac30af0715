"""The tables of what was measured, one for each question."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vattn.bench.common import Distribution, console, duration
from vattn.bench.step.batch import Sized, ns_per_row
from vattn.bench.step.layouts import MODEL
from vattn.bench.step.pace import Pace
from vattn.bench.step.patterns import Growth
from vattn.units import format_bytes


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _median(samples: Sequence[float]) -> str:
    return duration(Distribution.of(samples).median) if samples else ""


def print_batch(results: Sequence[Sized]) -> None:
    """Print the steady step for each number of rows, beside its floors."""
    title = f"step(int64 array), everything mapped; one more row costs {ns_per_row(results):.2g} ns"
    numbers = ("rows", "n", "median", "p99", "copying the bytes", "empty call")
    table = _table(title, (), numbers)
    for r in results:
        times = (r.step.median, r.step.p99, r.copy.median, r.empty_call.median)
        table.add_row(str(r.rows), str(r.step.n), *(duration(ns) for ns in times))
    console.print(table)


def print_growth(results: Sequence[Growth], *, has_floor: bool) -> None:
    """Print each pattern in each layout, with the driver calls beside the time.

    Not alloc(), which is no step: the record has it.
    """
    results = [r for r in results if not r.kind.endswith("_alloc")]
    title = f"step() that grows rows of {MODEL.name}, by single steps; calls: in so many steps"
    if has_floor:
        title += "\nfloor: as many mmap through ctypes, whose own cost is in it"
    numbers = ("rows", "steps", "create", "map", "n", "median", "p99", "in driver", "floor")
    table = _table(title, ("pattern", "layout, page"), numbers)
    kinds = list(dict.fromkeys(r.kind for r in results))
    before = ""
    for r in sorted(results, key=lambda r: kinds.index(r.kind)):
        ns = Distribution.of(r.ns)
        counts = (r.rows, r.calls.get("steps", 1), r.calls.get("create", 0), r.calls["map"])
        times = (duration(ns.median), duration(ns.p99))
        medians = (_median(r.driver_ns), _median(r.floor_ns))
        if r.kind != before:
            table.add_section()
        pattern = "" if r.kind == before else r.pattern
        counted = tuple(str(count) for count in (*counts, ns.n))
        table.add_row(pattern, r.layout, *counted, *times, *medians)
        before = r.kind
    console.print(table)


def print_paces(paces: Sequence[Pace]) -> None:
    """Print what decoding paid on the critical path, with prefetch and without."""
    models = dict.fromkeys(f"{p.layout}: {p.model}" for p in paces)
    title = f"Decoding, {paces[0].period_ms:g} ms a step ({'; '.join(models)})\n"
    title += "map time: in driver calls on the critical path, mean of all steps"
    numbers = ("rows", "lookahead", "map time", "no call", "step median", "p99", "max")
    behind = ("calls in step", "in background", "late")
    table = _table(title, ("layout, page",), (*numbers, *behind))
    for p in paces:
        layout = f"{p.layout}, {format_bytes(p.page_bytes)}"
        times = (p.step.median, p.step.p99, p.step.max)
        table.add_row(
            layout,
            str(p.rows),
            str(p.lookahead),
            duration(p.driver_ns_per_step),
            f"{p.without_calls_percent:.1f}%",
            *(duration(ns) for ns in times),
            str(sum(p.calls.values())),
            str(p.background_calls),
            str(p.late_steps),
        )
    console.print(table)
