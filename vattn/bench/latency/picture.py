"""The picture: what the calls of a range cost by its size, one handle against many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vattn.bench import common
from vattn.bench.common import Measurement
from vattn.bench.plots import save_figure
from vattn.units import format_bytes

PANELS = ("create", "map", "unmap", "release")
COLORS = ("#1f6fb4", "#b4472f", "#2e9e6b")
STYLES = {"raw": "-", "vattn": "--"}

Line = list[tuple[int, float]]


def _lines(call: str, measurements: Sequence[Measurement]) -> dict[tuple[str, str], Line]:
    """Size and median by backend and manner. Access is a part of mapping, as it is in vattn."""
    sums: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for m in measurements:
        backend, manner, size, name = m.name.split("/")
        if name == call or (call == "map" and name == "set_access"):
            sums[backend, manner][int(size)] += m.ns.median
    return {line: sorted(by_size.items()) for line, by_size in sums.items()}


def _ticks(sizes: Iterable[int]) -> list[int]:
    """Sizes whose names do not overlap below the axis."""
    ticks: list[int] = []
    for size in sorted(sizes):
        if not ticks or size >= 4 * ticks[-1]:
            ticks.append(size)
    return ticks


def _draw_panel(
    axes: Axes,
    call: str,
    lines: dict[tuple[str, str], Line],
    manners: Sequence[str],
    floor: Sequence[float],
) -> None:
    for (backend, manner), line in lines.items():
        axes.plot(
            [size for size, _ in line],
            [ns for _, ns in line],
            STYLES[backend],
            color=COLORS[manners.index(manner)],
            marker="o",
            markersize=3.5,
            label=f"{manner}, {backend}",
        )
    for ns in floor:
        axes.axhline(ns, color="#777777", linewidth=1, linestyle=":", label="floor of a call")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(
        FixedLocator(_ticks({s for line in lines.values() for s, _ in line}))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(int(size))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ns, _: common.duration(ns)))
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)
    axes.set_title(call)
    axes.grid(alpha=0.25)


def draw(
    device: str, measurements: Sequence[Measurement], floor: Sequence[float], stem: Path
) -> list[Path]:
    """Draw the table of sizes.

    Parameters
    ----------
    device : str
        What was measured, for the title.
    measurements : sequence of Measurement
        From :func:`vattn.bench.latency.measure.measure`.
    floor : sequence of float
        Nanoseconds that a call that does nothing costs; empty if that is not known.
    stem : pathlib.Path
        Where to write, without a suffix.

    Returns
    -------
    list of pathlib.Path
        PNG and SVG.
    """
    panels = {call: _lines(call, measurements) for call in PANELS}
    if any(m.name.endswith("/set_access") for m in measurements):
        panels = {("map + set access" if c == "map" else c): lines for c, lines in panels.items()}
    manners = list(dict.fromkeys(m.name.split("/")[1] for m in measurements))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (call, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        _draw_panel(axes, call, lines, manners, floor)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.supylabel("all calls for a range together, median")
    figure.suptitle(f"Driver calls by size of the range, one handle against many ({device})")
    return save_figure(figure, stem)
