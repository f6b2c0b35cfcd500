"""Fifteen corruptions of images at five strengths, after Hendrycks & Dietterich 2019, section 3.

Noise, blur, weather and digital, as they name them; made here, so accuracies are not those of ImageNet-C's own files.
Large images are first reduced to SIDE pixels, about as ImageNet-C's; lengths in pixels are for images of 224 and grow
with the image. A corruption is a function of (seed, index of the image, name, strength) and the image alone.

Letters: H, W pixels of an image [H, W, 3], float32 from 0 to 1.
"""

import dataclasses
import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hovle_jax.data.images import as_image
from hovle_jax.errors import UserError
from hovle_jax.evaluation.shift.pixels import clipped, convolved, disk, displaced, fractal, gaussian, line, resized

SIDE = 256  # pixels of the shorter side, at most
NOMINAL = 224  # pixels of the image that lengths are for
STRENGTHS = (1, 2, 3, 4, 5)
Random = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One of them.

    Attributes:
      kind: 'noise', 'blur', 'weather' or 'digital'.
      apply: (image, amount, rng) -> image; what is outside 0 to 1 is cut off.
      amounts: what the five strengths are.
    """

    kind: str
    apply: Callable[[np.ndarray, Any, Random], np.ndarray]
    amounts: tuple


def reduced(image: Any) -> Any:
    """A Pillow image whose shorter side has SIDE pixels at most: what is corrupted, and what is the clean one."""
    image = as_image(image)
    share = SIDE / min(image.size)
    if share >= 1:
        return image
    width, height = image.size
    return image.resize((round(width * share), round(height * share)), reducing_gap=3.0)


def corrupt(image: Any, name: str, strength: int, index: int = 0, seed: int = 0) -> Any:
    """A Pillow image, or [H, W, 3] uint8 -> the corrupted Pillow image.

    Args:
      name: a key of CORRUPTIONS.
      strength: 1 to 5.
      index: of the image among others.
    """
    corruption = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, index, zlib.crc32(name.encode()), strength])
    pixels = np.asarray(reduced(image).convert("RGB"), np.float32) / 255
    made = corruption.apply(pixels, corruption.amounts[strength - 1], rng)
    return as_image(np.round(clipped(made) * 255).astype(np.uint8))


def find_corruptions(named: str) -> tuple[str, ...]:
    """'all', kinds and names with commas -> names. Raises UserError for an unknown one."""
    kinds = dict.fromkeys(corruption.kind for corruption in CORRUPTIONS.values())
    found = {}
    for name in filter(None, (part.strip() for part in named.split(","))):
        chosen = [key for key, value in CORRUPTIONS.items() if name in ("all", key, value.kind)]
        if not chosen:
            raise UserError(f"--corruptions: there is no {name!r}; use all, {', '.join([*kinds, *CORRUPTIONS])}")
        found |= dict.fromkeys(chosen)
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def _gaussian_noise(x, deviation, rng):
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x, photons, rng):
    return rng.poisson(x * photons) / photons


def _impulse_noise(x, share, rng):
    """Single values become 0 or 1."""
    drawn = rng.random(x.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


# ---------------------------------------------------------------------------------------------------------------------
# Blur


def _pixels(x, length):
    """A length of an image of NOMINAL pixels in this one."""
    return length * min(x.shape[:2]) / NOMINAL


def _defocus_blur(x, radius, rng):
    return convolved(x, disk(_pixels(x, radius)))


def _glass_blur(x, amount, rng):
    """Pixels change places with near ones several times, between two weak blurs."""
    deviation, reach, times = amount
    x = convolved(x, gaussian(_pixels(x, deviation)))
    for _ in range(times):
        shift = rng.uniform(-1, 1, (2, *x.shape[:2])) * max(1.0, _pixels(x, reach))
        x = displaced(x, np.round(shift))
    return convolved(x, gaussian(_pixels(x, deviation)))


def _motion_blur(x, length, rng):
    return convolved(x, line(_pixels(x, length), rng.uniform(0, np.pi)))


def _zoom_blur(x, zoom, rng):
    """The mean of the image and of its middle, enlarged up to `zoom` times."""
    H, W = x.shape[:2]
    steps, total = np.linspace(1, zoom, 12), np.zeros_like(x)
    for step in steps:
        height, width = H / step, W / step
        total += resized(x, (H, W), box=((W - width) / 2, (H - height) / 2, (W + width) / 2, (H + height) / 2))
    return total / len(steps)


# ---------------------------------------------------------------------------------------------------------------------
# Weather


def _snow(x, amount, rng):
    """Falling flakes, larger and smaller ones, before a paler image."""
    density, paleness, length = amount
    H, W = x.shape[:2]
    angle, layer = rng.uniform(np.pi / 3, 2 * np.pi / 3), np.zeros((H, W), np.float32)
    for size in (1.0, 2.5):
        size = max(1.0, _pixels(x, size))
        grid = rng.random((max(2, int(H / size)), max(2, int(W / size))))
        layer += resized((grid < density).astype(np.float32), (H, W))
    flakes = clipped(2 * convolved(layer[:, :, None], line(_pixels(x, length), angle)))
    grey = x.mean(axis=2, keepdims=True)
    pale = (1 - paleness) * x + paleness * np.maximum(x, 0.5 * grey + 0.5)
    return pale + flakes * (1 - 0.3 * pale)


def _frost(x, amount, rng):
    """Ice that grows from crests of noise, whiter where several meet."""
    kept, ice = amount
    H, W = x.shape[:2]
    crests = [1 - np.abs(2 * fractal(rng, H, W, 0.65, first=first) - 1) for first in (2, 3, 4)]
    crystals = np.prod([crest**2 for crest in crests], axis=0)
    crystals = clipped(crystals / max(float(np.quantile(crystals, 0.97)), 1e-6))[:, :, None]
    return kept * x + ice * crystals * np.asarray([0.86, 0.94, 1.0], np.float32)


def _fog(x, amount, rng):
    thickness, roughness = amount
    H, W = x.shape[:2]
    largest = max(float(x.max()), 1e-6)
    mist = fractal(rng, H, W, roughness)[:, :, None]
    return (x + thickness * mist) * largest / (largest + thickness)


def _brightness(x, more, rng):
    """More of HSV's value, with hue and saturation as they are."""
    value = x.max(axis=2, keepdims=True)
    return np.where(value > 0, x / np.maximum(value, 1e-6), 1.0) * np.minimum(value + more, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Digital


def _contrast(x, kept, rng):
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _elastic(x, amount, rng):
    """A smooth random field moves the pixels."""
    reach, grain = amount
    H, W = x.shape[:2]
    field = np.stack([2 * fractal(rng, H, W, 0.3, first=grain, octaves=2) - 1 for _ in range(2)])
    return displaced(x, field * _pixels(x, reach))


def _pixelate(x, share, rng):
    H, W = x.shape[:2]
    small = resized(x, (max(1, round(H * share)), max(1, round(W * share))), "BOX")
    return resized(small, (H, W), "NEAREST")


def _jpeg(x, quality, rng):
    from PIL import Image

    file = io.BytesIO()
    as_image(np.round(x * 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"), np.float32) / 255


CORRUPTIONS = {
    "gaussian_noise": Corruption("noise", _gaussian_noise, (0.06, 0.1, 0.16, 0.24, 0.36)),
    "shot_noise": Corruption("noise", _shot_noise, (70, 30, 14, 7, 3.5)),
    "impulse_noise": Corruption("noise", _impulse_noise, (0.02, 0.05, 0.1, 0.17, 0.28)),
    "defocus_blur": Corruption("blur", _defocus_blur, (2, 3.5, 5, 7, 9.5)),
    "glass_blur": Corruption(
        "blur", _glass_blur, ((0.6, 1, 1), (0.7, 1.6, 2), (0.9, 2.2, 2), (1.1, 3, 2), (1.4, 4, 3))
    ),
    "motion_blur": Corruption("blur", _motion_blur, (8, 13, 19, 26, 34)),
    "zoom_blur": Corruption("blur", _zoom_blur, (1.1, 1.16, 1.23, 1.3, 1.4)),
    "snow": Corruption(
        "weather", _snow, ((0.02, 0.2, 8), (0.035, 0.3, 10), (0.05, 0.4, 12), (0.07, 0.5, 14), (0.1, 0.6, 16))
    ),
    "frost": Corruption("weather", _frost, ((0.95, 0.35), (0.85, 0.5), (0.75, 0.65), (0.7, 0.75), (0.6, 0.9))),
    "fog": Corruption("weather", _fog, ((1.0, 0.45), (1.5, 0.45), (2.0, 0.5), (2.5, 0.5), (3.2, 0.55))),
    "brightness": Corruption("weather", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption("digital", _contrast, (0.5, 0.35, 0.24, 0.14, 0.07)),
    "elastic": Corruption("digital", _elastic, ((5, 4), (8, 4), (11, 4), (9, 5), (13, 5))),
    "pixelate": Corruption("digital", _pixelate, (0.5, 0.36, 0.26, 0.2, 0.14)),
    "jpeg": Corruption("digital", _jpeg, (28, 18, 12, 8, 5)),
}  # fmt: skip
