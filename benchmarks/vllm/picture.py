"""The picture: resident bytes of the KV cache over time, one line for each engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vattn.bench.plots import save_figure

_STYLES = {
    "stock": ("#b4472f", "-", "stock vLLM"),
    "elastic": ("#1f6fb4", "-", "elastic"),
    "elastic-budget": ("#1f6fb4", "--", "elastic, with a budget"),
    "contiguous": ("#e0a458", "-", "contiguous"),
}


def draw(series: Mapping[str, Sequence[tuple[float, int]]], stem: Path) -> list[Path]:
    """Draw samples of (seconds, bytes) of each engine. Returns the files."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, samples in series.items():
        color, style, label = _STYLES[kind]
        axes.plot(
            [seconds for seconds, _ in samples],
            [size / 2**20 for _, size in samples],
            color=color,
            linestyle=style,
            label=label,
        )
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds since the first request")
    axes.set_ylabel("MiB of KV cache that are resident")
    axes.set_title("Memory of the KV cache: a load, then nothing", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, stem)
