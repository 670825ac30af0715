"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.hf_generate.results import Part
from benchmarks.sharing.shapes import tokens_name
from vattn.bench.common import console, duration, print_measurements


def human_bytes(count: float | None) -> str:
    """Write bytes with a unit that fits.

    >>> human_bytes(3 * 2**29), human_bytes(2**20), human_bytes(None)
    ('1.50 GiB', '1.00 MiB', '')
    """
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _print(title: str, headings: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(str, line))
    console.print(table)


def print_prefix(part: Part) -> None:
    """Print one line for each budget."""
    print_measurements("Calls of the prefix cache, and step()", part.measurements)
    headings = (
        *("budget", "found, ideal", "vattn", "ratio", "whole blocks", "endless cache"),
        *("hits", "no call", "copied/hit", "calls/request", "ended early", "CPU seconds"),
    )
    lines = []
    for row in part.rows:
        ours, ideal = row["vattn"], row["ideal"]
        lines.append(
            (
                row["budget"],
                f"{ideal['hit_tokens'] / ideal['prompt_tokens']:.2%}",
                f"{ours['hit_tokens'] / ours['prompt_tokens']:.2%}",
                f"{row['hit_ratio']:.4f}",
                f"{row['whole_block_ratio']:.4f}",
                f"{ours['possible_tokens'] / ours['prompt_tokens']:.2%}",
                ours["hits"],
                row["hits_without_a_call"],
                human_bytes(row["copied_bytes_per_hit"]),
                f"{row['driver_calls_per_request']:.2f}",
                f"{ours['ended_early']} (ideal {ideal['ended_early']})",
                f"{ours['cpu_s']:.1f} (ideal {ideal['cpu_s']:.1f})",
            )
        )
    title = (
        "Tokens of the prompts that were found again. ratio: to the ideal cache, which finds whole "
        "blocks of 512 tokens; whole blocks: of these alone; no call: hits that made no "
        "driver call"
    )
    _print(title, headings, lines)


def print_fork(part: Part) -> None:
    """Print one line for each row that was forked."""
    headings = (
        *("layout", "tokens", "fork", "p99", "copy", "ratio", "limit of the fork", "of the copy"),
        *("copied", "first read", "again", "ratio with first read"),
    )
    times = {m.name: m.ns for m in part.measurements}
    lines = []
    for row in part.rows:
        fork = times[f"{row['name']}/fork"]
        ns = {name: duration(value) for name, value in row["ns"].items()}
        lines.append(
            (
                f"{row['layout']}, {row['end']}",
                row["tokens"],
                f"{ns['fork']} (n = {fork.n})",
                duration(fork.p99),
                ns["copy"],
                f"{row['copy_over_fork']:.1f} x",
                ns["limit"],
                ns["memcpy"],
                human_bytes(row["copied_bytes"]),
                ns["first_read"],
                ns["second_read"],
                f"{row['copy_over_fork_and_first_read']:.1f} x",
            )
        )
    title = (
        "A fork maps; who reads the child faults its pages in, which first read has and again has "
        "not. The copy is into memory that is there. Medians"
    )
    _print(title, headings, lines)


def print_samples(part: Part) -> None:
    """Print one line for each prompt."""
    headings = ("layout", "prompt", "one", "all", "own tokens", "ratio", "by the kernel", "read")
    lines = [
        (
            row["layout"],
            row["prompt_tokens"],
            human_bytes(row["one_mapped_bytes"]),
            human_bytes(row["all_mapped_bytes"]),
            human_bytes(row["own_bytes"]),
            f"{row['mapped_ratio']:.4f}",
            f"{row['physical_ratio']:.4f}",
            human_bytes(row["all_mapped_bytes"] + row["all_aliased_bytes"]),
        )
        for row in part.rows
    ]
    samples = part.rows[0]["samples"] if part.rows else 0
    title = (
        f"Memory of {samples} samples of one prompt. ratio: without own tokens, to that of one; by "
        "the kernel: the same from st_blocks of the file in memory; read: bytes under all rows"
    )
    _print(title, headings, lines)


def print_window(part: Part) -> None:
    """Print one line for each length."""
    print_measurements("A token more in every row", part.measurements)
    headings = ("rows", "tokens", "mapped", "by the kernel", "bound", "steps with growth")
    lines = [
        (
            f"{row['layout']}, {row['kind']}",
            f"{tokens_name(row['tokens'])} ({row['tokens'] // row['window']} W)",
            human_bytes(row["mapped_bytes"]),
            human_bytes(row["physical_bytes"]),
            human_bytes(row["bound_bytes"]) if row["kind"] == "window" else "",
            row["steps_with_growth"],
        )
        for row in part.rows
    ]
    title = "Memory of rows with a window W, beside full ones, which nobody wrote"
    _print(title, headings, lines)
