"""The picture: a step against the number of rows, and map time with prefetch and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vattn.bench.common import duration
from vattn.bench.plots import save_figure
from vattn.bench.step.batch import Sized
from vattn.bench.step.pace import Pace

_STEP, _FLOOR = "#1f6fb4", "#8a8a8a"
_BY_LOOKAHEAD = ("#b4472f", "#e0a458", "#7fb3d9", "#1f6fb4")  # none, then more and more


def draw(results: Sequence[Sized], paces: Sequence[Pace], stem: Path) -> list[Path]:
    """Draw what there is: one panel for the batch sizes, one for each layout that was decoded in.

    Returns the files written; none if there is nothing to draw.
    """
    layouts = list(dict.fromkeys(pace.layout for pace in paces))
    panels = bool(results) + len(layouts)
    if panels == 0:
        return []
    figure = Figure(figsize=(5.2 * panels, 4.6), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if results:
        _draw_batch(axes.pop(0), results)
    top = 30 * max([1000.0, *(pace.driver_ns_per_step for pace in paces)])
    for layout in layouts:
        _draw_paces(axes.pop(0), [pace for pace in paces if pace.layout == layout], top)
    return save_figure(figure, stem)


def _draw_batch(axes: Axes, results: Sequence[Sized]) -> None:
    rows = [r.rows for r in results]
    axes.plot(rows, [r.step.p99 for r in results], color=_STEP, linestyle=":", label="step(), p99")
    axes.plot(rows, [r.step.median for r in results], color=_STEP, marker="o", label="median")
    copies = [r.copy.median for r in results]
    axes.plot(rows, copies, color=_FLOOR, marker=".", label="np.copyto of the same bytes")
    empty = results[0].empty_call.median
    axes.axhline(empty, color=_FLOOR, linestyle="--", label="an empty call")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(rows))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_ylim(0, 1.1 * max(r.step.p99 for r in results))
    axes.set_title("step(), everything mapped", loc="left", fontsize=11)
    _finish(axes, "rows")


def _draw_paces(axes: Axes, paces: Sequence[Pace], top_ns: float) -> None:
    all_rows = sorted({pace.rows for pace in paces})
    lookaheads = sorted({pace.lookahead for pace in paces})
    width = 0.8 / len(lookaheads)
    by_case = {(pace.rows, pace.lookahead): pace.driver_ns_per_step for pace in paces}
    for i, lookahead in enumerate(lookaheads):
        heights = [by_case.get((rows, lookahead), 0.0) for rows in all_rows]
        where = [at + (i - (len(lookaheads) - 1) / 2) * width for at in range(len(all_rows))]
        label = f"lookahead {lookahead}" if lookahead else "without prefetch"
        color = _BY_LOOKAHEAD[i % len(_BY_LOOKAHEAD)]
        bars = axes.bar(where, heights, width, color=color, label=label)
        texts = [duration(ns) if ns else "0" for ns in heights]
        axes.bar_label(bars, texts, fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(all_rows)), [str(rows) for rows in all_rows])
    # Linear at the bottom: with prefetch most of them are exactly 0.
    axes.set_yscale("symlog", linthresh=1000)
    axes.set_ylim(0, top_ns)
    axes.yaxis.set_major_locator(FixedLocator([0, *(10.0**power for power in range(3, 10))]))
    first = paces[0]
    axes.set_title(
        f"map time in step(), mean of {first.steps} decode steps\n{first.layout}, {first.model}, "
        f"{first.period_ms:g} ms a step",
        loc="left",
        fontsize=11,
    )
    _finish(axes, "rows, one token each per step")


def _finish(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ns, _: duration(ns) if ns else "0"))
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
