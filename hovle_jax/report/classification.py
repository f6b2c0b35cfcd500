"""Figures of classifiers: confusion, reliability, images with their bars."""

import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from hovle_jax.report.figures import figure_of, save_figure
from hovle_jax.report.plots import COLOR, RIGHT, WRONG

NAME_WIDTH = 22  # characters of a class's name
MOST_NAMES = 40  # classes whose names can be read beside a confusion picture
LINE = 0.24  # inches


def short(name: str, width: int = NAME_WIDTH) -> str:
    """A name that takes so many characters at most; nothing in it is a formula."""
    name = " ".join(name.split())
    shown = name if len(name) <= width else f"{name[: width - 3].rstrip()}..."
    return shown.replace("$", r"\$")


def plot_confusion(counts: np.ndarray, names: Sequence[str], path: str | os.PathLike, title: str) -> pathlib.Path:
    """Rows are the right classes, columns what images were taken for; a cell is a share of its row.

    Args:
      counts: [C, C] images.
      path: the PNG to write.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    side = max(4.0, 2.2 + LINE * len(names))
    figure = figure_of(side + 1.6, side)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks, shown = range(len(names)), [short(name) for name in names]
    axis.set_xticks(ticks, shown, rotation=90, fontsize=7)
    axis.set_yticks(ticks, [f"{name} ({int(n)})" for name, n in zip(shown, totals[:, 0])], fontsize=7)
    if len(names) <= MOST_NAMES // 2:
        for row, column in np.ndindex(*shares.shape):
            if counts[row, column]:
                color = "white" if shares[row, column] > 0.5 else "black"
                text = f"{100 * shares[row, column]:.0f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xlabel("taken for", fontsize=8)
    axis.set_ylabel("class (images)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, format=lambda share, _: f"{100 * share:.0f}%")
    bar.ax.tick_params(labelsize=7)
    return save_figure(figure, path)


def plot_confused(
    pairs: Sequence[tuple[str, str, int]], path: str | os.PathLike, title: str, accuracies: np.ndarray
) -> pathlib.Path:
    """Where classes are too many for `plot_confusion`: the commonest mistakes, and how accuracies are spread.

    Args:
      pairs: (class, taken for, images).
      accuracies: [C] of the classes, from 0 to 1.
    """
    figure = figure_of(10, max(3.5, 0.9 + LINE * len(pairs)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = [f"{short(a)} → {short(b)}" for a, b, _ in pairs]
    bars = left.barh(range(len(pairs)), [n for *_, n in pairs], color=WRONG)
    left.set_yticks(range(len(pairs)), labels, fontsize=7)
    left.bar_label(bars, fontsize=7, padding=2)
    left.invert_yaxis()
    left.set_title("commonest mistakes (images)", fontsize=9, loc="left")
    right.hist(100 * accuracies[np.isfinite(accuracies)], bins=np.linspace(0, 100, 21), color=COLOR)
    right.set_title("classes by their accuracy", fontsize=9, loc="left")
    right.set_xlabel("% right", fontsize=8)
    right.set_ylabel("classes", fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def plot_reliability(
    counts: np.ndarray, confidences: np.ndarray, accuracies: np.ndarray, path: str | os.PathLike, title: str
) -> pathlib.Path:
    """Accuracy over confidence, and how many images have each confidence: [B] bins of equal width."""
    edges, width = np.arange(len(counts)) / len(counts), 1 / len(counts)
    figure = figure_of(4.6, 5.2)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    full = counts > 0
    top.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", label="as sure as right")
    top.bar(edges[full], accuracies[full], width, align="edge", color=COLOR, edgecolor="white", label="right")
    top.plot(confidences[full], accuracies[full], "o", color=WRONG, markersize=4, label="mean confidence")
    top.set_ylabel("share of images that are right", fontsize=8)
    top.set_ylim(0, 1)
    top.legend(frameon=False, fontsize=7, loc="upper left")
    top.set_title(title, fontsize=9, loc="left")
    bottom.bar(edges, counts, width, align="edge", color="0.6", edgecolor="white")
    bottom.set_xlim(0, 1)
    bottom.set_xlabel("probability of the chosen class", fontsize=8)
    bottom.set_ylabel("images", fontsize=8)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return save_figure(figure, path)


def plot_classified(
    shown: Sequence[tuple[object, str, Sequence[tuple[str, float]]]], path: str | os.PathLike, columns: int = 2
) -> pathlib.Path:
    """Images with bars of their likeliest classes.

    Args:
      shown: (image, its name, ((class, probability), ...)), the likeliest class first.
      path: the image to write.
    """
    columns = min(columns, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns)
    most = max((len(bars) for *_, bars in shown), default=1)
    figure = figure_of(5.4 * columns, max(1.9, 0.8 + LINE * most) * rows)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(2, 3) * columns).reshape(-1, 2)
    for left, right in axes[len(shown) :]:
        left.set_visible(False)
        right.set_visible(False)
    for (left, right), (image, name, bars) in zip(axes, shown):
        left.imshow(image)
        left.set_axis_off()
        left.set_title(short(name, 28), fontsize=8)
        colors = [RIGHT, *[COLOR] * (len(bars) - 1)]
        drawn = right.barh(range(len(bars)), [p for _, p in bars], color=colors)
        right.set_yticks(range(len(bars)), [short(label) for label, _ in bars], fontsize=8)
        right.bar_label(drawn, [f"{100 * p:.1f}%" for _, p in bars], fontsize=7, padding=2)
        right.set_ylim(most - 0.5, -0.5)
        right.set_xlim(0, 1.25)
        right.set_xticks([])
        right.spines[["top", "right", "bottom"]].set_visible(False)
    return save_figure(figure, path)
