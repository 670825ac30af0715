"""The picture: time over that with torch.empty, by tokens, a line for each subject."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from vattn.bench.attention.results import Result
from vattn.bench.plots import save_figure

Points = dict[int, float]  # tokens: ratio, the median over batches
_OURS, _THEIRS = "-", "--"
_MARKERS = "os^vD"
_COLORS = ("#1f6fb4", "#7fb3d9", "#2a9d5c", "#9ccb86", "#e0a458", "#b4472f", "#8a8a8a", "#5d4a8f")


def series(results: Sequence[Result]) -> dict[str, Points]:
    """Ratios of each subject by tokens."""
    found: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for line in result.lines:
            if line.ratio is not None:
                by_tokens = found.setdefault(line.subject, {})
                by_tokens.setdefault(result.case.tokens, []).append(line.ratio.median)
    return {
        subject: {tokens: statistics.median(some) for tokens, some in sorted(by_tokens.items())}
        for subject, by_tokens in found.items()
    }


def draw(results: Sequence[Result], device: str, folder: Path, stem: str) -> list[Path]:
    """Draw each phase: models across, types down. Returns the files, none if there is no ratio."""
    files: list[Path] = []
    for phase in dict.fromkeys(result.case.phase for result in results):
        some = [result for result in results if result.case.phase == phase]
        if series(some):
            figure = _figure(some, f"{phase} on {device}")
            files += save_figure(figure, folder / f"{stem}-{phase}")
    return files


def _figure(results: Sequence[Result], title: str) -> Figure:
    models = list(dict.fromkeys(result.case.shape.name for result in results))
    dtypes = list(dict.fromkeys(result.case.dtype for result in results))
    figure = Figure(figsize=(5 * len(models) + 1, 3.6 * len(dtypes) + 1), layout="constrained")
    grid = figure.subplots(len(dtypes), len(models), squeeze=False, sharex=True)
    parts = [subject.rpartition("/") for subject in series(results)]
    colors = dict(zip(dict.fromkeys(store for store, _, _ in parts), itertools.cycle(_COLORS)))
    markers = dict(zip(dict.fromkeys(kernel for _, _, kernel in parts), itertools.cycle(_MARKERS)))
    for row, dtype in enumerate(dtypes):
        for column, model in enumerate(models):
            axes = grid[row][column]
            some = [r for r in results if (r.case.shape.name, r.case.dtype) == (model, dtype)]
            _lines(axes, series(some), colors, markers)
            axes.set_xticks(sorted({result.case.tokens for result in results}))
            axes.set_title(f"{model}, {dtype}", loc="left", fontsize=10)
            if column == 0:
                axes.set_ylabel("time over that with torch.empty")
            if row == len(dtypes) - 1:
                axes.set_xlabel("tokens in each row")
    drawn: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= zip(labels, handles, strict=True)
    figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title}: median over batch sizes", x=0.01, ha="left")
    return figure


def _lines(
    axes: Axes, by_subject: dict[str, Points], colors: dict[str, str], markers: dict[str, str]
) -> None:
    """Draw colors by store, markers by kernel."""
    for name, points in by_subject.items():
        store, _, kernel = name.rpartition("/")
        axes.plot(
            list(points),
            list(points.values()),
            _OURS if store.startswith("vattn") else _THEIRS,
            marker=markers[kernel],
            markersize=4,
            color=colors[store],
            label=name,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ratios = [1.0, *(ratio for points in by_subject.values() for ratio in points.values())]
    if max(ratios) > 1.5 * min(ratios):
        axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
