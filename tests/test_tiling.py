"""Tiles: InternVL's grids and pixels, against outputs of transformers and against a plain second version."""

import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.data.augmentation import recompress
from hovle_jax.data.images import Tiling
from hovle_jax.model.vision import normalize_tiles
from tests.shared import golden_roots


def grids(folder):
    """[{name: value}] of a golden folder: ours has the names once."""
    stored = json.loads((folder / "grids.json").read_text())
    return [dict(zip(stored["names"], row)) for row in stored["rows"]] if "names" in stored else stored


@pytest.mark.parametrize("folder", golden_roots("tiling"))
def test_grids_are_those_of_internvl(folder):
    cases = grids(folder)
    assert len(cases) > 600
    for case in cases:
        tiling = Tiling(case["image_size"], case["min_num"], case["max_num"], case["use_thumbnail"])
        width, height = case["width"], case["height"]
        assert tiling.grid(width, height) == (case["columns"], case["rows"]), case
        assert tiling.count(width, height) == case["tiles"], case


@pytest.mark.parametrize("folder", golden_roots("tiling"))
def test_pixels_are_those_of_internvl(folder):
    stored = np.load(folder / "pixels.npz")
    names = [name.removeprefix("image") for name in stored if name.startswith("image")]
    assert names
    for name in names:
        size, fewest, most, thumbnail = map(int, stored[f"params{name}"])
        tiles = Tiling(size, fewest, most, bool(thumbnail)).cut(Image.fromarray(stored[f"image{name}"]))
        pixels = np.asarray(normalize_tiles(tiles)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(pixels, stored[f"pixel_values{name}"], atol=1e-6)


def test_each_tile_shows_its_part_and_the_thumbnail_the_whole():
    """An image of 3 x 2 blocks of one colour each, whose sides are those of the tiles: nothing is interpolated."""
    colours = np.arange(1, 7, dtype=np.uint8).reshape(2, 3)
    blocks = np.repeat(np.repeat(colours, 16, axis=0), 16, axis=1)
    tiles = Tiling(16, 1, 6).cut(Image.fromarray(np.stack([blocks] * 3, axis=-1)))
    assert len(tiles) == 7
    assert [np.unique(tile).tolist() for tile in tiles[:6]] == [[1], [2], [3], [4], [5], [6]]
    assert tiles[6, 0, 0, 0] == 1 and tiles[6, 0, -1, 0] == 3 and tiles[6, -1, 0, 0] == 4 and tiles[6, -1, -1, 0] == 6


def tile_by_tile(image, tiling):
    """The plain way: crops of the resized image, one after the other."""
    S, (columns, rows) = tiling.size, tiling.grid(*image.size)
    whole = image.resize((columns * S, rows * S), Image.Resampling.BICUBIC)
    tiles = [whole.crop((c * S, r * S, (c + 1) * S, (r + 1) * S)) for r in range(rows) for c in range(columns)]
    if tiling.thumbnail and len(tiles) > 1:
        tiles.append(image.resize((S, S), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (31, 97), (200, 20), (1, 1), (1, 40), (32, 16)])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_crops_of_the_resized_image(size, thumbnail):
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    tiling = Tiling(16, 1, 6, thumbnail)
    tiles = tiling.cut(image)
    np.testing.assert_array_equal(tiles, tile_by_tile(image, tiling))
    assert len(tiles) == tiling.count(*size)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((800, 400), (2, 1)),  # the ratio itself, of the few tiles that it needs
        ((1792, 896), (4, 2)),  # 4 x 2 has the same ratio, and the image more than half its pixels
        ((448, 448), (1, 1)),
        ((1000, 1000), (3, 3)),  # 1 x 1, 2 x 2 and 3 x 3 are as near; it has more than half the pixels of the larger
        ((100, 3000), (1, 12)),
        ((3000, 100), (12, 1)),
    ],
)
def test_grids_by_hand(size, grid):
    assert Tiling(448, 1, 12).grid(*size) == grid


def test_images_of_one_sample_share_its_tiles():
    tiling = Tiling(448, 1, 12)
    assert [tiling.shared_by(n).max_tiles for n in (0, 1, 2, 5, 12, 40)] == [12, 12, 6, 2, 1, 1]


def test_recompression_changes_each_tile_a_little_and_by_its_seed():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
    tiles = np.repeat(np.asarray(smooth)[None], 5, axis=0)
    made = recompress(tiles, np.random.default_rng(1))
    np.testing.assert_array_equal(made, recompress(tiles, np.random.default_rng(1)))
    assert made.shape == tiles.shape and len(np.unique(made.reshape(5, -1), axis=0)) > 1  # qualities of their own
    error = np.abs(made.astype(int) - tiles)
    assert 0 < error.mean() < 8


@pytest.mark.parametrize(
    "tiles, thumbnail, most", [(1, True, 1), (2, True, 1), (5, True, 4), (13, True, 12), (99, True, 12), (5, False, 5)]
)
def test_a_grid_has_no_more_tiles_than_a_row(tiles, thumbnail, most):
    tiling = Tiling(448, 3, 12, thumbnail).within(tiles)
    assert tiling.max_tiles == most and tiling.min_tiles == min(3, most)
    assert max(tiling.count(w, h) for w in (100, 448, 3000) for h in (100, 448, 3000)) <= tiles
