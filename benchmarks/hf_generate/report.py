"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.hf_generate.generate import STOCK
from benchmarks.hf_generate.model import GIB, MIB, Shape
from vattn.bench.common import Measurement, console, duration

Row = dict[str, Any]


def mlp_note(shape: Shape) -> str:
    """Say what the figures of the part ``generate`` are about."""
    return (
        f"{shape}. The MLP is small, so that attention and cache are what is measured; the last "
        "column is its share of the time. The keys of the prompt are random, not from a prefill; "
        "the first token is not counted; nothing is compiled"
    )


def human_bytes(count: float | None) -> str:
    """Write bytes with a unit that fits."""
    if count is None:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _table(title: str, headings: Sequence[str], *, left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at < left else "right", no_wrap=True)
    return table


def _rate(rate: dict[str, Any]) -> str:
    ends = f" ({rate['min']:.3g}-{rate['max']:.3g})" if len(rate["rounds"]) > 1 else ""
    return f"{rate['median']:.3g}{ends}"


def print_update(rows: Sequence[Row]) -> None:
    """Print how much faster writing in place is than concatenating."""
    headings = (
        "dtype",
        "batch",
        "tokens",
        "bytes/token",
        "copied GB/s",
        "VAttnCache",
        "StaticCache",
    )
    title = "One token into the cache: time of DynamicCache, as a multiple of that of"
    table = _table(title, headings, left=1)
    for row in rows:
        table.add_row(
            row["dtype"],
            str(row["batch"]),
            str(row["context"]),
            str(row["token_bytes"]),
            f"{row['copied_bytes_per_s'] / 1e9:.1f}",
            f"{row['dynamic_over_vattn']:.3g} x",
            f"{row['dynamic_over_static']:.3g} x",
        )
    console.print(table)


def print_generate(rows: Sequence[Row], measurements: Sequence[Measurement], shape: Shape) -> None:
    """Print one line for each case and subject, beside the stock of the same case."""
    headings = (
        *("dtype", "tokens", "subject", "tokens/s", "of stock", "token", "p99"),
        *("peak growth", "of stock", "cache", "MLP"),
    )
    times = {m.name: m.ns for m in measurements}
    table = _table(mlp_note(shape), headings, left=3)
    stock: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        case = row["dtype"], row["context"], row["batch"]
        if row["subject"] == STOCK.name:
            stock[case] = row
        ns = times["generate/{}/{}/b{}/".format(*case) + row["subject"]]
        speed = peak = ""
        if case in stock:
            base = stock[case]
            speed = f"{row['tokens_per_s']['median'] / base['tokens_per_s']['median']:.2f} x"
            peak = f"{row['peak_growth_bytes'] / base['peak_growth_bytes']:.2f} x"
        table.add_row(
            row["dtype"],
            f"{row['batch']} x {row['context']}",
            row["subject"],
            _rate(row["tokens_per_s"]),
            speed,
            duration(ns.median),
            duration(ns.p99),
            human_bytes(row["peak_growth_bytes"]),
            peak,
            human_bytes(row["kv_bytes"]),
            f"{row['mlp_share']:.0%}",
        )
    console.print(table)


def print_batching(rows: Sequence[Row]) -> None:
    """Print one line for each scenario and subject."""
    headings = (
        *("scenario", "subject", "tokens/s", "serving", "p99 token"),
        *("equal requests", "equal tokens"),
    )
    title = (
        "Requests of different lengths, float32. serving: from the first request to the last "
        "token, without what the call does before and after; equal: to the tokens of each alone"
    )
    table = _table(title, headings, left=2)
    for row in rows:
        gap = row["p99_gap_ns"]
        table.add_row(
            row["scenario"],
            row["subject"],
            _rate(row["tokens_per_s"]),
            f"{row['tokens_per_s_serving']['median']:.3g}",
            "" if gap is None else duration(gap),
            f"{row['equal_requests']} of {row['requests']}",
            f"{row['equal_tokens']} of {row['new_tokens']}",
        )
    console.print(table)
