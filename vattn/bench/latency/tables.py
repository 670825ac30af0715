"""The tables of ``vattn bench latency``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from vattn.bench import common
from vattn.bench.common import Measurement
from vattn.bench.latency.calls import CALLS
from vattn.bench.latency.published import CALL_NS
from vattn.units import format_bytes


def print_sizes(title: str, measurements: Sequence[Measurement], *, published: bool) -> None:
    """Print medians, one line for each size, manner and backend."""
    lines: dict[tuple[str, str, int], dict[str, Measurement]] = defaultdict(dict)
    for m in measurements:
        backend, manner, bytes_, call = m.name.split("/")
        lines[backend, manner, int(bytes_)][call] = m
    shown = [call for call in CALLS if any(call in by_call for by_call in lines.values())]
    table = Table(title=title, title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("manner")
    table.add_column("by", no_wrap=True)
    for heading in ("n", *shown):
        table.add_column(heading, justify="right", no_wrap=True)
    for (backend, manner, size), by_call in sorted(lines.items(), key=lambda item: item[0][2]):
        n = str(next(iter(by_call.values())).ns.n)
        cells = [common.duration(by_call[c].ns.median) if c in by_call else "" for c in shown]
        table.add_row(format_bytes(size), manner, backend, n, *cells)
    if published:
        cells = [common.duration(CALL_NS[c]) if c in CALL_NS else "" for c in shown]
        table.add_row("2 MiB", "vAttention, Table 3 (A100)", "paper", "", *cells)
    common.console.print(table)


def print_pairs(
    title: str, states: tuple[str, str], measurements: Sequence[Measurement], caption: str
) -> None:
    """Print what two states did to the same calls; names are ``part/.../state/call``."""
    lines: dict[tuple[str, str], dict[str, Measurement]] = defaultdict(dict)
    for m in measurements:
        _, *words, state, call = m.name.split("/")
        lines["/".join(words), call][state] = m
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("what")
    table.add_column("call", no_wrap=True)
    for state in states:
        table.add_column(f"{state}: n", justify="right", no_wrap=True)
        for heading in ("min", "median", "p99"):
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    last_what = None
    for (what, call), by_state in lines.items():
        cells = []
        for state in states:
            ns = by_state[state].ns
            cells += [str(ns.n), *map(common.duration, (ns.min, ns.median, ns.p99))]
        first, second = (by_state[state].ns.median for state in states)
        words = [format_bytes(int(word)) if word.isdigit() else word for word in what.split("/")]
        named = "" if what == last_what else ", ".join(words)
        table.add_row(named, call, *cells, f"{second / first:.2f}" if first else "")
        last_what = what
    common.console.print(table)
