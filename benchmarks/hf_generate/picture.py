"""The picture: tokens per second and memory of each subject, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from benchmarks.hf_generate.generate import SUBJECTS
from benchmarks.hf_generate.model import GIB

_COLORS = ("#8a8a8a", "#e0a458", "#b4472f", "#7fb3d9", "#1f6fb4")  # the stock, static, ours


def draw(rows: Sequence[dict[str, Any]], device: str, path: Path) -> None:
    """Draw one column for each dtype: tokens per second above, growth of memory below."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(6.5 * len(dtypes), 8), layout="constrained", squeeze=False
    )
    for column, dtype in enumerate(dtypes):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        speeds = {_key(row): row["tokens_per_s"]["median"] for row in of_dtype}
        peaks = {_key(row): row["peak_growth_bytes"] / GIB for row in of_dtype}
        _bars(axes[0][column], speeds, "tokens per second (log scale)")
        _bars(axes[1][column], peaks, "growth of memory at its peak, GiB (log scale)")
        axes[0][column].set_title(f"{dtype} on {device}", loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _key(row: dict[str, Any]) -> tuple[tuple[int, int], str]:
    return (row["context"], row["batch"]), row["subject"]


def _bars(axes: Axes, values: dict[tuple[tuple[int, int], str], float], label: str) -> None:
    """Draw a group of bars for each case; a gap where a subject was not measured."""
    cases = list(dict.fromkeys(case for case, _ in values))
    width = 0.8 / len(SUBJECTS)
    for at, subject in enumerate(SUBJECTS):
        heights = [values.get((case, subject.name), 0) for case in cases]
        where = [group + (at - (len(SUBJECTS) - 1) / 2) * width for group in range(len(cases))]
        bars = axes.bar(where, heights, width, color=_COLORS[at], label=subject.name)
        texts = [f"{height:.3g}" if height else "" for height in heights]
        axes.bar_label(bars, texts, fontsize=7, rotation=90, padding=2)
    names = [f"{context} tokens\nbatch {batch}" for context, batch in cases]
    axes.set_xticks(range(len(cases)), names)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.15)
    axes.set_ylabel(label)
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
