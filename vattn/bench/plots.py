"""Pictures: one way to write a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as ``<stem>.png`` and ``<stem>.svg`` and close it. Needs no display.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Made with ``Figure()`` or pyplot; it is empty afterwards.
    stem : pathlib.Path
        Where to write, without a suffix. Its folder is made if it is missing.

    Returns
    -------
    list of pathlib.Path
        The PNG, then the SVG, whose text stays text.

    >>> import tempfile
    >>> figure = Figure()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_figure(figure, Path(folder) / "a")]
    ['a.png', 'a.svg']
    """
    FigureCanvasAgg(figure)  # whatever canvas it had may need a display
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    with mpl.rc_context({"svg.fonttype": "none"}):
        for path in paths:
            figure.savefig(path, dpi=150, bbox_inches="tight")
    figure.clear()
    return paths
