"""Writes tests/golden/tiling: dynamic tiles of InternVL by transformers' own image processor (Pillow's resampling).

python tests/reference/make_tiles.py
"""

import itertools
import json

import numpy as np
from common import GOLDEN
from PIL import Image
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as internvl

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
NAMES = ("width", "height", "min_num", "max_num", "image_size", "use_thumbnail", "columns", "rows", "tiles")
LIMITS = ((1, 12, 448), (1, 6, 448), (2, 9, 448), (1, 24, 448), (1, 1, 448), (1, 12, 224))
KNOWN = ((448, 448), (640, 427), (640, 480), (1000, 1000), (1920, 1080), (1, 5000), (5000, 1), (900, 300), (300, 900))
# (width, height, tile size, min_num, max_num)
IMAGES = ((49, 31, 16, 1, 6), (20, 60, 12, 1, 6), (30, 30, 16, 2, 4), (16, 16, 16, 1, 12))


def undecided(width, height, grids):
    """Whether two grids of as many tiles are as near: which one wins depends on how they were collected."""
    near = {}
    for columns, rows in grids:
        near.setdefault((abs(width / height - columns / rows), columns * rows), []).append((columns, rows))
    return any(len(same) > 1 for same in near.values())


def limits(size):
    """Images just below and above half of the pixels of k c x k r tiles, which have the ratio of c x r tiles."""
    sides = [int(size * k / 2**0.5) + more for k in (2, 3, 4) for more in (0, 1)]
    return [(c * side, r * side) for c, r in ((1, 1), (2, 1), (1, 2), (3, 2)) for side in sides]


def grid_rows():
    rng = np.random.default_rng(0)
    for fewest, most, size in LIMITS:
        drawn = np.exp(rng.uniform(np.log(40), np.log(4000), (20, 2))).astype(int).tolist()
        grids = internvl.get_all_supported_aspect_ratios(fewest, most)
        exact = [(size * c // 2, size * r // 2) for c, r in grids][:15]  # the ratios themselves
        for width, height in itertools.chain(KNOWN, exact, limits(size), drawn):
            if undecided(width, height, grids):
                continue
            columns, rows = internvl.get_optimal_tiled_canvas((height, width), (size, size), fewest, most)
            count = columns * rows
            for thumbnail in (True, False):
                yield width, height, fewest, most, size, thumbnail, columns, rows, count + (thumbnail and count > 1)


def pixels(width, height, size, fewest, most, rng):
    """-> (image [H, W, 3] uint8, pixel_values [tiles, 3, S, S] float32)."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    processor = internvl.GotOcr2ImageProcessorPil(
        image_mean=MEAN, image_std=STD, size=dict(height=size, width=size),
        crop_to_patches=True, min_patches=fewest, max_patches=most,
    )  # fmt: skip
    values = processor(Image.fromarray(image), return_tensors="np").pixel_values
    return image, np.asarray(values, np.float32)


def main():
    folder = GOLDEN / "tiling"
    folder.mkdir(exist_ok=True)
    rows = list(grid_rows())
    (folder / "grids.json").write_text(json.dumps({"names": NAMES, "rows": rows}, separators=(",", ":")) + "\n")
    rng, arrays = np.random.default_rng(1), {}
    for i, (width, height, size, fewest, most) in enumerate(IMAGES):
        arrays[f"image{i}"], arrays[f"pixel_values{i}"] = pixels(width, height, size, fewest, most, rng)
        arrays[f"params{i}"] = np.asarray([size, fewest, most, 1])
    np.savez_compressed(folder / "pixels.npz", **arrays)
    print(len(rows), "grids;", {path.name: path.stat().st_size for path in folder.iterdir()})


if __name__ == "__main__":
    main()
