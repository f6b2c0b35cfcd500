"""Attention maps as one image: for each layer the whole map, the text-to-image part, and what the answer took from the
tiles."""

import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hovle_jax.inference.attention_maps import AttentionMaps

KINDS = {"text": "#2563a8", "image": "#d97706", "answer": "#18794e"}  # colours of the tokens along a map
MAP_COLORS = "magma"
DARK = 0.4  # weights to this power are drawn: most are far below the largest
MOST_LABELS = 32  # rows that are named
PANEL = 4.0  # inches
GAP = 0.06  # between tiles, as a part of their side
VISIBLE = 0.35  # how much of a tile is seen where nothing looks at it


def draw(maps: "AttentionMaps", path: str | os.PathLike, title: str) -> pathlib.Path:
    """Writes the image, of the kind that the path's ending names.

    Rows: the map of all tokens, heads averaged; its part from the text after the images to the visual tokens, tiles
    apart; the tiles, bright where the answer's tokens look, the mean over them. Columns: layers.

    Returns:
      the path.
    """
    from matplotlib.figure import Figure

    columns = len(maps.layers)
    figure = Figure(figsize=(PANEL * columns + 1, PANEL * 2.75), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False, height_ratios=(1, 0.75, 0.9))
    bright = maps.of_answer.mean(1)
    for column, layer in enumerate(maps.layers):
        _whole(axes[0, column], maps, column)
        axes[0, column].set_title(
            f"layer {layer + 1} of {maps.num_layers}: sparsity {maps.sparsity[column]:.2f}\n"
            f"{100 * maps.image_share[column]:.1f}% of the text's attention is on images",
            fontsize=10,
        )
        _text_to_image(axes[1, column], maps, column)
        axes[2, column].imshow(_mosaic(overlaid(maps.tiles, bright[column]), maps.images))
        axes[2, column].set_axis_off()
    axes[0, 0].set_ylabel("from token")
    axes[1, 0].set_ylabel("from text after the images")
    axes[2, 0].set_title("what the answer looks at", fontsize=9, loc="left")
    figure.suptitle(_short(title), fontsize=11)
    _legend(figure)
    path = pathlib.Path(path)
    figure.savefig(path, dpi=110)
    return path


def overlaid(tiles: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Tiles, dark where nothing looks and in their own colours where the largest weight of all tiles is.

    Args:
      tiles: [M, S, S, 3] uint8.
      weights: [M, g, g].
    Returns:
      [M, S, S, 3] uint8.
    """
    size = tiles.shape[1]
    cell = np.arange(size) * weights.shape[1] // size
    light = (weights / max(float(weights.max()), np.finfo(np.float32).tiny)) ** DARK
    light = VISIBLE + (1 - VISIBLE) * light[:, cell][:, :, cell, None]
    return (tiles * light).round().astype(np.uint8)


def _whole(axis: Any, maps: "AttentionMaps", column: int) -> None:
    from matplotlib.colors import to_rgb

    axis.imshow(maps.weights[column] ** DARK, cmap=MAP_COLORS, interpolation="nearest", vmin=0, vmax=1)
    n = len(maps.is_image)
    kinds = np.where(maps.is_image, "image", np.where(np.arange(n) < maps.answer, "text", "answer"))
    strip = np.asarray([to_rgb(KINDS[kind]) for kind in kinds])
    width = 0.035 * n
    for image, extent in ((strip[:, None], (-1.5 * width, -0.5 * width, n, 0)), (strip[None], (0, n, n + width, n))):
        axis.imshow(image, extent=[x - 0.5 for x in extent], interpolation="nearest", aspect="auto")
    axis.set_xlim(-1.6 * width, n)
    axis.set_ylim(n + 1.1 * width, -0.5)
    axis.set_aspect("equal")
    axis.set_frame_on(False)
    axis.tick_params(labelsize=8)


def _text_to_image(axis, maps, column):
    rows = maps.text_to_image[column]
    axis.imshow(rows**DARK, cmap=MAP_COLORS, interpolation="nearest", aspect="auto", vmin=0)
    per_tile = rows.shape[1] // len(maps.tiles)
    for tile in range(1, len(maps.tiles)):
        axis.axvline(tile * per_tile - 0.5, color="white", linewidth=0.8)
    axis.set_xlabel("visual tokens, tile after tile", fontsize=8)
    axis.tick_params(labelsize=7)
    first = maps.text_after_images.start
    if len(rows) <= MOST_LABELS:
        axis.set_yticks(range(len(rows)), [_label(text) for text in maps.texts[first:]])
        for label, at in zip(axis.get_yticklabels(), range(first, first + len(rows))):
            label.set_color(KINDS["answer" if at >= maps.answer else "text"])


def _label(text):
    """One token, so that matplotlib reads no formula in it and a blank is seen."""
    return repr(text)[1:-1].replace("$", r"\$")[:14] or "␣"


def _mosaic(tiles, images):
    """Tiles on white as their images lie: each image a block, its thumbnail in a row of its own."""
    size, gap = tiles.shape[1], max(1, round(GAP * tiles.shape[1]))
    step, places, row = size + gap, [], 0
    for image in images:
        cells = image.tiles - image.thumbnail
        places += [(row + cell // image.columns, cell % image.columns) for cell in range(cells)]
        row += cells // image.columns
        if image.thumbnail:
            places.append((row, 0))
            row += 1
    columns = max(image.columns for image in images)
    canvas = np.full((row * step - gap, columns * step - gap, 3), 255, np.uint8)
    for tile, (row, column) in zip(tiles, places):
        canvas[row * step : row * step + size, column * step : column * step + size] = tile
    return canvas


def _legend(figure):
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=kind) for kind, color in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _short(title):
    line = " ".join(title.split()).replace("$", r"\$")
    return line if len(line) <= 110 else line[:109] + "…"
