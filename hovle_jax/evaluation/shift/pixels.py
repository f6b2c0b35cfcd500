"""What corruptions of images are made of: kernels and their convolution, resampling, noise of all sizes.

Letters: H, W pixels of an image [H, W, channels] or [H, W], float32.
"""

import numpy as np


def clipped(x: np.ndarray) -> np.ndarray:
    """Within 0 and 1."""
    return np.clip(x, 0.0, 1.0)


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[H, W, channels] with an odd square kernel, by Fourier transforms; the image goes on as its mirror image."""
    reach = kernel.shape[0] // 2
    if not reach:
        return x
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "symmetric")
    shape = (padded.shape[0] + 2 * reach, padded.shape[1] + 2 * reach)
    product = np.fft.rfft2(padded, shape, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[:, :, None]
    made = np.fft.irfft2(product, shape, axes=(0, 1))
    return made[2 * reach : 2 * reach + x.shape[0], 2 * reach : 2 * reach + x.shape[1]].astype(np.float32)


def _around(reach):
    """(down, right) of each place of a kernel from its middle."""
    side = np.arange(-reach, reach + 1)
    return np.meshgrid(side, side, indexing="ij")


def _normal(kernel):
    return (kernel / kernel.sum()).astype(np.float32)


def disk(radius: float) -> np.ndarray:
    """A lens out of focus: a disk of this radius with an edge of one pixel."""
    down, right = _around(int(np.ceil(radius + 0.5)))
    return _normal(np.clip(radius + 0.5 - np.hypot(down, right), 0, 1))


def gaussian(deviation: float) -> np.ndarray:
    """Three deviations far."""
    down, right = _around(int(np.ceil(3 * deviation)))
    return _normal(np.exp(-(down**2 + right**2) / (2 * max(deviation, 1e-3) ** 2)))


def line(length: float, angle: float) -> np.ndarray:
    """A movement: a line through the middle, one pixel wide; angle in radians, from the right towards the bottom."""
    half = max(0.0, (length - 1) / 2)
    down, right = _around(int(np.ceil(half)))
    along = right * np.cos(angle) + down * np.sin(angle)
    across = down * np.cos(angle) - right * np.sin(angle)
    inside = np.clip(half + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return _normal(inside)


def displaced(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Each pixel from where `shift` [2, H, W] (down, right) points, bilinear; beyond the edge lies the edge."""
    H, W = x.shape[:2]
    down = np.clip(np.arange(H)[:, None] + shift[0], 0, H - 1)
    right = np.clip(np.arange(W)[None] + shift[1], 0, W - 1)
    top, left = np.floor(down).astype(int), np.floor(right).astype(int)
    below, beside = np.minimum(top + 1, H - 1), np.minimum(left + 1, W - 1)
    v, u = (down - top)[:, :, None].astype(np.float32), (right - left)[:, :, None].astype(np.float32)
    upper = x[top, left] * (1 - u) + x[top, beside] * u
    lower = x[below, left] * (1 - u) + x[below, beside] * u
    return upper * (1 - v) + lower * v


def resized(
    x: np.ndarray, size: tuple[int, int], how: str = "BILINEAR", box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """[H, W] or [H, W, channels] at another size (height, width), by a filter of Pillow; box: the part to take."""
    from PIL import Image

    channels = [x] if x.ndim == 2 else [x[:, :, i] for i in range(x.shape[2])]
    method = Image.Resampling[how]
    made = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channel, np.float32)).resize((size[1], size[0]), method, box))
        for channel in channels
    ]
    return made[0] if x.ndim == 2 else np.stack(made, axis=2)


def fractal(
    rng: np.random.Generator, height: int, width: int, roughness: float, first: int = 1, octaves: int = 0
) -> np.ndarray:
    """[H, W] from 0 to 1: noise at many sizes, each half as large as the one before and `roughness` times as strong.

    Args:
      first: the coarsest noise has 2^first + 1 points a side.
      octaves: how many sizes; 0 = down to single pixels.
    """
    octaves = octaves or max(1, int(np.ceil(np.log2(max(height, width, 2)))) - first)
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        side = 2 ** (first + octave) + 1
        grid = rng.random((side, side)).astype(np.float32)
        total += roughness**octave * resized(grid, (height, width), "BICUBIC")
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)
