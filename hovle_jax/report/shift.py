"""Figures of shift: accuracy by corruption and strength, accuracy by variant, and what the corruptions look like."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from hovle_jax.report.figures import figure_of, save_figure
from hovle_jax.report.plots import COLOR


def plot_heat(
    accuracies: np.ndarray, names: Sequence[str], clean: float, path: str | os.PathLike, title: str
) -> pathlib.Path:
    """Accuracy over corruptions and strengths.

    Args:
      accuracies: [corruptions, strengths] percent.
      clean: percent, on the images as they are.
      path: the PNG to write.
    """
    rows, columns = accuracies.shape
    figure = figure_of(1.0 + 0.75 * (columns + 3), 1.2 + 0.3 * rows)
    axis = figure.subplots()
    means = accuracies.mean(axis=1, keepdims=True)
    shown = np.concatenate([accuracies, means], axis=1)
    image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=max(clean, float(shown.max())), aspect="auto")
    for row, column in np.ndindex(*shown.shape):
        dark = shown[row, column] < 0.6 * image.get_clim()[1]
        text, color = f"{shown[row, column]:.0f}", "white" if dark else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(columns + 1), [*map(str, range(1, columns + 1)), "mean"], fontsize=8)
    axis.set_yticks(range(rows), [name.replace("_", " ") for name in names], fontsize=8)
    axis.axvline(columns - 0.5, color="white", linewidth=3)
    axis.set_xlabel("strength", fontsize=8)
    axis.set_title(
        f"{title}\n% right; {clean:.1f} without corruption, {shown[:, :-1].mean():.1f} with", fontsize=9, loc="left"
    )
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    return save_figure(figure, path)


def plot_variants(
    clean: Mapping[str, float], shifted: Mapping[str, float], path: str | os.PathLike, title: str
) -> pathlib.Path:
    """Accuracy on each variant as a bar, and on the clean images as a mark: {variant: percent}."""
    names = list(shifted)
    figure = figure_of(7.0, 1.2 + 0.35 * len(names))
    axis = figure.subplots()
    bars = axis.barh(range(len(names)), [shifted[name] for name in names], color=COLOR)
    axis.plot([clean[name] for name in names], range(len(names)), "|", color="black", markersize=14, label="clean")
    axis.bar_label(bars, [f"{shifted[name]:.1f}" for name in names], fontsize=8, padding=3)
    axis.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("% right", fontsize=8)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10, loc="left")
    return save_figure(figure, path)


def plot_costs(points: Sequence[tuple[str, float, float, float]], path: str | os.PathLike, title: str) -> pathlib.Path:
    """Accuracy over FLOPs of an image, as in Radford et al. 2021, figure 10: (model, FLOPs, clean, shifted percent)."""
    figure = figure_of(6.0, 4.0)
    axis = figure.subplots()
    for i, (name, flops, clean, shifted) in enumerate(points):
        axis.plot([flops, flops], [clean, shifted], color=f"C{i}", linewidth=0.8)
        axis.plot([flops], [clean], "o", color=f"C{i}", label=name.replace("$", r"\$"))
        axis.plot([flops], [shifted], "o", color=f"C{i}", markerfacecolor="white")
    axis.set_xscale("log")
    axis.set_xlabel("FLOPs of an image", fontsize=8)
    axis.set_ylabel("% right: clean (full), shifted (hollow)", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    return save_figure(figure, path)


def plot_corruptions(
    images: Mapping[str, Sequence[object]], path: str | os.PathLike, title: str, blocks: int = 2
) -> pathlib.Path:
    """A contact sheet: {corruption: its images at each strength}, in `blocks` columns of rows."""
    names = list(images)
    strengths = max(len(several) for several in images.values())
    rows = -(-len(names) // blocks)
    figure = figure_of(1.15 * strengths * blocks, 0.5 + 1.3 * rows)
    axes = figure.subplots(rows, strengths * blocks, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for number, name in enumerate(names):
        block, row = divmod(number, rows)
        for strength, image in enumerate(images[name]):
            axis = axes[row, block * strengths + strength]
            axis.imshow(image)
            text = f"{name.replace('_', ' ')} 1" if not strength else str(strength + 1)
            axis.set_title(text, fontsize=7, loc="left")
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)
