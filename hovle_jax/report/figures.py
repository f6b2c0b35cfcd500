"""Figures of matplotlib, made and written without a screen."""

import os
import pathlib
from typing import Any


def figure_of(width: float, height: float) -> Any:
    """A figure of so many inches."""
    # Not pyplot: it keeps every figure of the process and picks a canvas by the machine's screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> pathlib.Path:
    """Writes a figure -> its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
