"""The picture: one panel for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.sharing.shapes import tokens_name
from vattn.bench.common import duration
from vattn.bench.plots import save_figure

_OURS, _OTHER, _LIMIT, _COST = "#1f6fb4", "#b4472f", "#8a8a8a", "#e0a458"
_GIB = 2**30
Row = dict[str, Any]


def draw(parts: Mapping[str, Sequence[Row]], stem: Path) -> list[Path]:
    """Draw what there is. Returns the files; none if there is nothing to draw."""
    panels = {name: _PANELS[name] for name in _PANELS if parts.get(name)}
    if not panels:
        return []
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * lines), layout="constrained")
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (name, panel) in zip(every, panels.items(), strict=False):
        panel(axes, parts[name])
        axes.legend(fontsize=8, frameon=False)
        axes.grid(visible=True, axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    return save_figure(figure, stem)


def _prefix(axes: Axes, rows: Sequence[Row]) -> None:
    at = range(len(rows))
    width = 0.38
    for shift, side, color in ((-1, "ideal", _LIMIT), (1, "vattn", _OURS)):
        label = {"ideal": "ideal cache of blocks of 512 tokens", "vattn": "vattn"}[side]
        shares = [100 * row[side]["hit_tokens"] / row[side]["prompt_tokens"] for row in rows]
        bars = axes.bar(
            [x + shift * width / 2 for x in at], shares, width, color=color, label=label
        )
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=8, padding=2)
    endless = max(row["vattn"]["possible_tokens"] / row["vattn"]["prompt_tokens"] for row in rows)
    axes.axhline(100 * endless, color=_COST, linestyle="--", label="memory without end")
    axes.set_xticks(at, [row["budget"] for row in rows])
    axes.margins(y=0.25)
    axes.set_ylabel("% of prompt tokens found again")
    axes.set_title("Prefixes found again, by memory", loc="left", fontsize=11)


def _fork(axes: Axes, rows: Sequence[Row]) -> None:
    layout = rows[0]["layout"]
    lines = (
        ("page", "copy", _OTHER, "-", "copy"),
        ("page", "first_read", _COST, "--", "first read of the child"),
        ("in_page", "fork", _OURS, ":", "fork, last page partly filled"),
        ("page", "fork", _OURS, "-", "fork, whole pages"),
    )
    sizes = sorted({row["size"] for row in rows})
    for end, what, color, style, label in lines:
        chosen = [row for row in rows if (row["layout"], row["end"]) == (layout, end)]
        tokens = [row["size"] for row in chosen]
        times = [row["ns"][what] for row in chosen]
        axes.plot(tokens, times, color=color, linestyle=style, marker="o", ms=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_name(int(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.set_xlabel("tokens of the row")
    axes.set_title(f"A fork beside a copy, 32 KiB a token, {layout}", loc="left", fontsize=11)


def _samples(axes: Axes, rows: Sequence[Row]) -> None:
    at = range(len(rows))
    width = 0.26
    of_all = [row["all_mapped_bytes"] + row["all_aliased_bytes"] for row in rows]
    n = rows[0]["samples"]
    bars = (
        ("one sample", [row["one_mapped_bytes"] for row in rows], _LIMIT),
        (f"{n} samples, forked", [row["all_mapped_bytes"] for row in rows], _OURS),
        (f"{n} samples, each with its own prompt", of_all, _OTHER),
    )
    for shift, (label, sizes, color) in enumerate(bars, start=-1):
        where = [x + shift * width for x in at]
        drawn = axes.bar(where, [size / _GIB for size in sizes], width, color=color, label=label)
        axes.bar_label(drawn, [f"{size / _GIB:.3g}" for size in sizes], fontsize=8, padding=2)
    names = [f"{row['layout']}\n{row['prompt_tokens']} tokens" for row in rows]
    axes.set_xticks(at, names, fontsize=8)
    axes.margins(y=0.3)
    axes.set_ylabel("GiB")
    axes.set_title("Memory of samples of one prompt", loc="left", fontsize=11)


def _window(axes: Axes, rows: Sequence[Row]) -> None:
    layout = rows[0]["layout"]
    for kind, color, label in (
        ("full", _OTHER, "full rows"),
        ("window", _OURS, f"rows with a window W of {rows[0]['window']} tokens"),
    ):
        chosen = [row for row in rows if (row["layout"], row["kind"]) == (layout, kind)]
        tokens = [row["tokens"] / row["window"] for row in chosen]
        mapped = [row["mapped_bytes"] / _GIB for row in chosen]
        axes.plot(tokens, mapped, color=color, marker="o", ms=4, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of the row, in windows")
    axes.set_ylabel("GiB mapped")
    axes.set_title(f"Memory of {rows[0]['rows']} rows with a window", loc="left", fontsize=11)


_PANELS = {"prefix": _prefix, "fork": _fork, "samples": _samples, "window": _window}
