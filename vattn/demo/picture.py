"""The picture: what memory did while text was generated."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no window
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vattn.demo.measure import Run
from vattn.demo.report import human_bytes

_MAPPED, _USED, _RESERVED = "#1f6fb4", "#2e9e6b", "#b4472f"


def draw(run: Run, max_seq_len: int, folder: Path) -> list[Path]:
    """Draw mapped and used bytes against what a reservation takes, as PNG and SVG."""
    steps = range(len(run.samples))
    mapped = [sample.mapped_bytes for sample in run.samples]
    used = [sample.used_bytes for sample in run.samples]
    reserving = run.details["reserving_bytes"]
    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.axhline(reserving, color=_RESERVED, linewidth=2, linestyle=(0, (5, 2)))
    axes.plot(steps, mapped, color=_MAPPED, linewidth=2.2, drawstyle="steps-post")
    axes.plot(steps, used, color=_USED, linewidth=2.2)
    axes.fill_between(steps, used, mapped, step="post", color=_MAPPED, alpha=0.12, linewidth=0)
    axes.set_yscale("log", base=2)
    low, high = min(used) / 3, reserving * 2.5
    axes.set_ylim(low, high)
    ticks = [2.0**power for power in range(10, 60, 2) if low < 2.0**power < high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.set_xlim(0, max(1, len(mapped) - 1))
    rows = run.tokens.shape[0]
    middle = (len(mapped) - 1) / 2
    for value, text, color, above in (
        (reserving, f"reserving {rows} x {max_seq_len:,} tokens: {human_bytes(reserving)}",
         _RESERVED, False),
        (max(mapped), f"mapped by vattn: {human_bytes(mapped[0])} to {human_bytes(mapped[-1])}",
         _MAPPED, True),
        (min(used), f"used by tokens: {human_bytes(used[0])} to {human_bytes(used[-1])}",
         _USED, False),
    ):  # fmt: skip
        axes.annotate(
            text,
            (middle, value),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=color,
            fontsize=11,
        )
    axes.set_xlabel("tokens generated after the prompt")
    axes.set_ylabel("bytes for keys and values (log scale)")
    axes.set_title(
        f"{rows} prompts: {reserving / max(mapped):,.0f} times less memory than reserving for the "
        "model's longest text",
        loc="left",
        fontsize=12,
    )
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    paths = [folder / "memory.png", folder / "memory.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
