"""A contact sheet of what a search has found."""

import math
import os
import pathlib
from collections.abc import Sequence

from hovle_jax.report.classification import short
from hovle_jax.report.figures import figure_of, save_figure

SIDE = 1.9  # inches
NAME = 26  # characters of a path's end


def plot_hits(
    hits: Sequence[tuple[object, str, float]], path: str | os.PathLike, title: str, columns: int = 4
) -> pathlib.Path:
    """Images in the order in which they were found, each with its name and score.

    Args:
      hits: (image, or None for one that cannot be shown; its name; its score).
      path: the picture to write.
    """
    columns = min(columns, max(1, len(hits)))
    rows = max(1, math.ceil(len(hits) / columns))
    figure = figure_of(max(4.0, SIDE * columns), (SIDE + 0.35) * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(hits) :]:
        axis.set_axis_off()
    for place, (axis, (image, name, score)) in enumerate(zip(axes, hits), 1):
        if image is not None:
            axis.imshow(image)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("0.85")  # so that a white image has an end
        shown = (name if len(name) <= NAME else f"...{name[-NAME:]}").replace("$", r"\$")
        axis.set_title(f"{place}. {shown}\n{score:.3f}", fontsize=7)
    figure.suptitle(short(title, 30 * columns), fontsize=11)
    return save_figure(figure, path)
