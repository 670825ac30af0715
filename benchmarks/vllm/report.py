"""Lines of the JSON file, and the tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from benchmarks.sharing.report import human_bytes
from benchmarks.vllm.engines import Played
from benchmarks.vllm.figures import Spread, percentile, pooled, ratios
from vattn.bench.common import (
    Measurement,
    Target,
    at_least,
    at_most,
    console,
    duration,
    print_measurements,
)

GOAL_RATIO = 0.97
Row = dict[str, Any]


def row_of(kind: str, arrivals: str, rounds: Sequence[Played], stock: Sequence[Played]) -> Row:
    """Summarize the rounds of one engine under one kind of arrivals."""
    rates = [played.times.requests_per_s for played in rounds]
    of_stock = [played.times.requests_per_s for played in stock]
    return {
        "engine": kind,
        "arrivals": arrivals,
        "requests": len(rounds[0].times.tokens),
        "tokens": sum(map(len, rounds[0].times.tokens)),
        "requests_per_s": asdict(Spread.of(rates)),
        "requests_per_s_over_stock": asdict(ratios(rates, of_stock)),
        "p50_ttft_ns_over_stock": asdict(_over(rounds, stock, "first_ns")),
        "p50_between_ns_over_stock": asdict(_over(rounds, stock, "between_ns")),
        "peak_bytes": asdict(Spread.of([played.peak_bytes for played in rounds])),
        "loaded_bytes": [played.loaded_bytes for played in rounds],
        "idle_bytes": [played.idle_bytes for played in rounds],
        "counted_bytes": [played.counted for played in rounds],
    }


def _over(rounds: Sequence[Played], stock: Sequence[Played], what: str) -> Spread:
    ours, theirs = (
        [percentile(getattr(played.times, what), 50) for played in some] for some in (rounds, stock)
    )
    return ratios(ours, theirs)


def measurements_of(kind: str, arrivals: str, rounds: Sequence[Played]) -> list[Measurement]:
    """Times to the first token and between tokens, of all rounds together."""
    return [
        Measurement(
            name=f"{arrivals}/{kind}/ttft",
            what=f"{kind}, {arrivals}: to the first token",
            ns=pooled([played.times.first_ns for played in rounds]),
        ),
        Measurement(
            name=f"{arrivals}/{kind}/between",
            what=f"{kind}, {arrivals}: between tokens",
            ns=pooled([played.times.between_ns for played in rounds]),
        ),
    ]


def targets_of(rows: Sequence[Row], idle_limits: Mapping[str, int]) -> list[Target]:
    """Goals: throughput of the elastic engine, and what idle engines keep.

    ``idle_limits``: for each engine of vattn, its floor and a page for its one group of layers.
    """
    found = []
    for row in rows:
        if (row["engine"], row["arrivals"]) == ("elastic", "at-once"):
            ratio = row["requests_per_s_over_stock"]["median"]
            found.append(at_least("requests/s, elastic beside stock", ratio, GOAL_RATIO, "x"))
    for kind, limit in idle_limits.items():
        most = max(max(row["idle_bytes"]) for row in rows if row["engine"] == kind)
        found.append(at_most(f"idle, {kind}", most / 2**20, limit / 2**20, "MiB"))
    return found


def print_rows(rows: Sequence[Row], measurements: Sequence[Measurement]) -> None:
    """Print one line for each engine under each kind of arrivals."""
    print_measurements("Latency, all rounds together", measurements)
    n = rows[0]["requests_per_s"]["n"] if rows else 0
    title = (
        f"{n} rounds. The rate, peak: medians; idle: the most. ratio, TTFT and between (p50): to "
        "stock in the same round, median (range)"
    )
    table = Table(title=title, title_justify="left")
    headings = ("engine", "arrivals", "requests/s", "ratio", "TTFT", "between")
    for heading in (*headings, "peak", "idle"):
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        table.add_row(
            row["engine"],
            row["arrivals"],
            f"{row['requests_per_s']['median']:.2f}",
            _range(row["requests_per_s_over_stock"]),
            _range(row["p50_ttft_ns_over_stock"]),
            _range(row["p50_between_ns_over_stock"]),
            human_bytes(row["peak_bytes"]["median"]),
            human_bytes(max(row["idle_bytes"])),
        )
    console.print(table)


def _range(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']:.3f} ({spread['min']:.3f}-{spread['max']:.3f})"


def one_line(kind: str, arrivals: str, played: Played) -> str:
    """Say what a round was like, when it is over."""
    first = percentile(played.times.first_ns, 50)
    return (
        f"{arrivals} {kind}: {played.times.requests_per_s:.2f} requests/s, first token "
        f"{duration(first)}, peak {human_bytes(played.peak_bytes)}, "
        f"idle {human_bytes(played.idle_bytes)}"
    )
