"""A figure of K-shot accuracy against that without any image."""

import os
import pathlib
from typing import Any

from hovle_jax.report.figures import figure_of, save_figure
from hovle_jax.report.plots import COLOR, HELD_OUT_COLOR, RIGHT


def plot_shots(result: dict[str, Any], path: str | os.PathLike) -> pathlib.Path:
    """Mean accuracies over the number of images a class, with their deviations; zero-shot and all images as lines.

    Args:
      result: of `probe_report.probe`: accuracy, zero_shot, shots, kind, images, classes.
      path: the PNG to write.
    """
    figure = figure_of(6.2, 4.0)
    axis = figure.subplots()
    rows = result["shots"]
    shots, means, deviations = zip(*((row["shots"], row["accuracy"], row["deviation"]) for row in rows))
    drawn = f"{result['kind']} probe, mean and deviation of {len(rows[0]['accuracies'])} draws"
    style: Any = {"color": COLOR, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.4, "label": drawn}
    axis.errorbar(shots, means, deviations, **style)
    whole = f"probe of all {result['images']:,} images: {result['accuracy']:.1f}%"
    axis.axhline(result["accuracy"], color=RIGHT, linewidth=1, linestyle=":", label=whole)
    zero = f"zero-shot: {result['zero_shot']:.1f}%"
    axis.axhline(result["zero_shot"], color=HELD_OUT_COLOR, linewidth=1.2, linestyle="--", label=zero)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(count) for count in shots])
    axis.minorticks_off()
    axis.set_xlabel("training images of each class", fontsize=9)
    axis.set_ylabel("accuracy, %", fontsize=9)
    axis.set_ylim(0, 100)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_title(f"{result['classes']} classes, {result['test_images']:,} test images", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
