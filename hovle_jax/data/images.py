"""Pictures: files in, square tiles out, and the augmentation of small corpora."""

import pathlib

import numpy as np

from hovle_jax.errors import UserError


def load_image(path):
    """A file's picture as Pillow image in RGB. Raises UserError when it is missing or no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no image at {path}; check the path given with --image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); convert it to PNG or JPEG") from None


def single_tile(image, size):
    """[1, size, size, 3] uint8: the whole picture, resized bicubically when it has another size."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)[None]


def augment(tile, rng, max_shift=8):
    """A mirrored and shifted copy of [S, S, 3]; what a shift uncovers gets the border's median colour."""
    if rng.random() < 0.5:
        tile = tile[:, ::-1]
    down, right = rng.integers(-max_shift, max_shift + 1, 2)
    border = np.concatenate([tile[0], tile[-1], tile[:, 0], tile[:, -1]])
    shifted = np.empty_like(tile)
    shifted[:] = np.median(border, axis=0).astype(np.uint8)
    height, width = tile.shape[:2]
    target = np.s_[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    source = np.s_[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
    shifted[target] = tile[source]
    return shifted
