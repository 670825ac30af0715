"""Two pictures: memory and requests over time, and where step() spent its time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from vattn.bench.plots import save_figure
from vattn.replay.outcome import FloatArray, Outcome
from vattn.replay.trace import Trace

_GIB = 2**30
_MAPPED, _GRANTED, _USED, _BUDGET = "#9db8d2", "#1f6fb4", "#2e9e6b", "#b4472f"
_WAITING = "#c58b1b"


def draw_memory(trace: Trace, outcomes: Sequence[Outcome], stem: Path) -> list[Path]:
    """Draw one column per policy: bytes above, requests below. Returns the files."""
    n = len(outcomes)
    figure = Figure(figsize=(4 * n + 1, 6), layout="constrained")
    axes = figure.subplots(2, n, squeeze=False, sharey="row", height_ratios=(3, 2))
    for column, outcome in enumerate(outcomes):
        _draw_bytes(axes[0][column], outcome)
        _draw_requests(axes[1][column], outcome)
        axes[0][column].sharex(axes[1][column])
        axes[0][column].tick_params(labelbottom=False)
    axes[0][0].set_ylabel("GiB")
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylabel("requests running")
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.suptitle(f"{trace.name}: {len(trace):,} requests", x=0.01, ha="left")
    return save_figure(figure, stem)


def _draw_bytes(axes: Axes, outcome: Outcome) -> None:
    series = outcome.series()
    at = series["start_s"]
    used, granted, mapped = (
        series[f"{name}_bytes"] / _GIB for name in ("used", "granted", "mapped")
    )
    axes.fill_between(at, mapped, color=_MAPPED, linewidth=0, alpha=0.6, label="mapped")
    axes.plot(at, granted, color=_GRANTED, linewidth=1.6, label="granted")
    axes.plot(at, used, color=_USED, linewidth=1, label="used")
    budget = outcome.budget_bytes / _GIB
    axes.axhline(budget, color=_BUDGET, linewidth=1, linestyle=(0, (5, 2)), label="budget")
    share = np.average(
        outcome.column("used_bytes") / outcome.column("granted_bytes"),
        weights=outcome.column("duration_s"),
    )
    axes.set_title(f"{outcome.policy}: {share:.1%} used", fontsize=10, loc="left")
    _plain(axes)


def _draw_requests(axes: Axes, outcome: Outcome) -> None:
    series = outcome.series()
    axes.plot(series["start_s"], series["running"], color=_GRANTED, linewidth=1)
    axes.set_xlabel("virtual time, s")
    _plain(axes)


def draw_steps(trace: Trace, outcome: Outcome, stem: Path) -> list[Path]:
    """Draw how long step() took, and when driver calls were made by whom. Returns the files."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    times, calls = figure.subplots(1, 2)
    decoding = outcome.decoding()
    step_us = outcome.column("grow_ns") / 1e3
    ends = np.log10([max(0.1, step_us.min()), max(1.0, step_us.max())])
    bins = np.logspace(ends[0], ends[1], 60)
    for chosen, color, label in (
        (decoding, _GRANTED, "decode"),
        (~decoding, _WAITING, "with a prefill"),
    ):
        style = {"histtype": "stepfilled", "alpha": 0.7}
        times.hist(step_us[chosen], bins=bins, color=color, label=label, **style)
    times.set_xscale("log")
    times.set_yscale("log")
    for axis in (times.xaxis, times.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    times.set_xlabel("step(), microseconds")
    times.set_ylabel("iterations")
    times.legend(fontsize=8)
    _plain(times)
    _draw_calls(calls, outcome)
    figure.suptitle(f"vattn, {trace.name}: {len(trace):,} requests", x=0.01, ha="left")
    return save_figure(figure, stem)


def _draw_calls(axes: Axes, outcome: Outcome) -> None:
    at = outcome.column("start_s")
    edges = np.linspace(at[0], at[-1] + outcome.column("duration_s")[-1], 101)
    for name, color, label in (
        ("calls_in_background", _MAPPED, "in the background"),
        ("calls_in_step", _BUDGET, "in step()"),
    ):
        axes.stairs(_per_bin(at, outcome.column(name), edges), edges, color=color, fill=True,
                    alpha=0.8, label=label)  # fmt: skip
    axes.set_xlabel("virtual time, s")
    axes.set_ylabel(f"driver calls in {edges[1] - edges[0]:.3g} s")
    axes.legend(fontsize=8)
    _plain(axes)


def _per_bin(at: FloatArray, so_far: FloatArray, edges: FloatArray) -> FloatArray:
    calls, _ = np.histogram(at, edges, weights=np.diff(so_far, prepend=0))
    return np.asarray(calls, dtype=np.float64)


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
