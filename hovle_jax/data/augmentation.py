"""What training changes about its images, from a sample's own random numbers."""

import dataclasses
import io
import math
import typing

import numpy as np

from hovle_jax.config import PairsConfig
from hovle_jax.data.images import as_image
from hovle_jax.data.resizing import Resizing

if typing.TYPE_CHECKING:  # Pillow is imported where it is used
    from PIL import Image

JPEG_QUALITIES = (75, 100)  # of InternVL's augmentation, inclusive
RATIOS = (3 / 4, 4 / 3)  # of width to height of a random crop
TRIES = 10  # at a crop that lies within the image


def recompress(tiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each tile after a JPEG compression of random quality (InternVL's `data_augment`): [n, S, S, 3] uint8."""
    from PIL import Image

    low, high = JPEG_QUALITIES
    recompressed = np.empty_like(tiles)
    for i, quality in enumerate(rng.integers(low, high + 1, len(tiles))):
        buffer = io.BytesIO()
        Image.fromarray(tiles[i]).save(buffer, "JPEG", quality=int(quality))
        recompressed[i] = np.asarray(Image.open(buffer))
    return recompressed


def shifted(tile: np.ndarray, rng: np.random.Generator, max_shift: int = 8) -> np.ndarray:
    """A copy of a tile [S, S, 3], mirrored and shifted at random; uncovered pixels get the border's median colour."""
    if rng.random() < 0.5:
        tile = tile[:, ::-1]
    down, right = rng.integers(-max_shift, max_shift + 1, 2)
    border = np.concatenate([tile[0], tile[-1], tile[:, 0], tile[:, -1]])
    moved = np.empty_like(tile)
    moved[:] = np.median(border, axis=0).astype(np.uint8)
    height, width = tile.shape[:2]
    target = np.s_[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    source = np.s_[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
    moved[target] = tile[source]
    return moved


@dataclasses.dataclass(frozen=True)
class PairAugmentation:
    """How the image of a pair changes: a random-resized crop, mirroring, colours (`PairsConfig`)."""

    config: PairsConfig

    def tile(self, image: "Image.Image | np.ndarray", resizing: Resizing, rng: np.random.Generator) -> np.ndarray:
        """An image -> [S, S, 3] uint8: a part of it, brought to the square."""
        from PIL import Image

        image, c = as_image(image), self.config
        box = random_crop(image.size, rng, c.crop_area)
        resample = Image.Resampling[resizing.interpolation.upper()]
        made = image.resize((resizing.size, resizing.size), resample, box=box)
        if c.flip and rng.random() < 0.5:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        made = self._coloured(made, rng)
        return np.asarray(made, np.uint8)

    def _coloured(self, image, rng):
        from PIL import ImageEnhance, ImageOps

        c = self.config
        if c.grayscale and rng.random() < c.grayscale:
            image = ImageOps.grayscale(image).convert("RGB")
        if not c.color_jitter:
            return image
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for number in rng.permutation(len(changes)):
            image = changes[number](image).enhance(rng.uniform(1 - c.color_jitter, 1 + c.color_jitter))
        return image


def random_crop(size: tuple[int, int], rng: np.random.Generator, smallest: float) -> tuple[int, int, int, int]:
    """A random part of an image, as in Inception's training (Szegedy et al. 2015) and torchvision.

    Args:
      size: (width, height).
      smallest: of its area, as a share of the image's, drawn from there to 1; its ratio is drawn from RATIOS.
    Returns:
      (left, top, right, bottom); the middle of the image, with the nearest ratio of these, where no draw fits into it.
    """
    width, height = size
    for _ in range(TRIES):
        area = width * height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    low, high = RATIOS
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
