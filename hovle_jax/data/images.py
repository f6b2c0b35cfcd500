"""Images: from files to square tiles.

Letters: S side of a tile, n number of tiles.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import typing
import warnings
from collections.abc import Iterator

import numpy as np

from hovle_jax.config import grid_within
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.system import malloc
from hovle_jax.system.budget import Budget

if typing.TYPE_CHECKING:  # Pillow is imported where it is used
    from PIL import Image

MAX_PIXELS = 2**26  # of an image, unless data.max_pixels says otherwise: half a gigabyte while it is decoded
# While it is decoded; of other formats 8: Pillow has 4 for RGB, and as many for what it was or was turned from.
BYTES_PER_PIXEL = {"JPEG2000": 24, "WEBP": 16, "AVIF": 16}
LARGE = 2**22  # pixels; decoding fewer takes no share of the budget, as 16 threads' take half of it at most
MAX_SIDE = 65_535  # JPEG's limit; libwebp takes minutes for an animation of a million columns, in 3 KB
# Formats that people keep images in. Pillow also reads documents, for which it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 swap width and height
TURNS = {  # orientation -> the transposition that makes it upright, by Pillow's name
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
DECODING = Budget(2**29)  # bytes of all large images that are being decoded at the same time
PNG_EXIF = (
    b"eXIf",
    b"Raw profile type exif",
    b"XML:com.adobe.xmp",
)  # chunks and keys that hold the orientation in a PNG


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _opened(data, max_pixels):
    from PIL import Image

    if len(data) == 0:
        raise BadSample("empty_image", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the number of pixels is checked below; other warnings are of no use here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("decompression_bomb", error) from None
    except Image.UnidentifiedImageError:
        raise BadSample("not_an_image", f"{len(data)} bytes that begin with {bytes(data[:12])!r}") from None
    except Exception as error:  # noqa: BLE001 (Pillow's readers raise anything on broken headers)
        raise BadSample("broken_image", error) from None
    width, height = image.size
    if min(width, height) < 1:
        raise BadSample("zero_size", f"{width} x {height}")
    if width * height > max_pixels:
        raise BadSample("decompression_bomb", f"{width} x {height} pixels, and at most {max_pixels:,} are read")
    if max(width, height) > MAX_SIDE:
        raise BadSample("decompression_bomb", f"{width} x {height} pixels, and at most {MAX_SIDE:,} a side are read")
    return image


def decode_image(data: bytes, upright: bool = True, max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """Decodes an image: its first frame, as Pillow's RGB.

    Args:
      data: the file's bytes.
      upright: rotate it as its EXIF orientation says.
      max_pixels: an image of more is refused by its header.
    Raises:
      BadSample: it is no image, or a broken one.
    """
    image = _opened(data, max_pixels)
    with _room_for(image):
        return _decoded(image, data, upright)


@contextlib.contextmanager
def decoded_image(data: bytes, upright: bool = True, max_pixels: int = MAX_PIXELS) -> "Iterator[Image.Image]":
    """`decode_image`, for what is no longer needed after the block: a large image keeps its share of memory until then.

    A thread that has one open must not open another.
    """
    opened = _opened(data, max_pixels)
    with _room_for(opened):
        image = _decoded(opened, data, upright)
        try:
            yield image
        finally:
            image.close()


@contextlib.contextmanager
def _room_for(image):
    pixels = image.size[0] * image.size[1]
    if pixels <= LARGE:
        yield
        return
    with DECODING.of(pixels * BYTES_PER_PIXEL.get(image.format, 8)):
        try:
            yield
        finally:
            malloc.give_back()


def _decoded(image, data, upright):
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            orientation = _orientation(image, data) if upright else 1
            if orientation != 1:
                image = image.transpose(Image.Transpose[TURNS[orientation]])
            return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise BadSample("decompression_bomb", "not enough memory to decode it") from None
    except Exception as error:  # noqa: BLE001 (see above)
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        raise BadSample("truncated_image" if truncated else "broken_image", error) from None


def image_size(data: bytes, upright: bool = True, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `decode_image` returns, read from the header alone. Raises BadSample."""
    image = _opened(data, max_pixels)
    width, height = image.size
    turned = upright and _orientation(image, data) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _orientation(image, data):
    """1 (upright) to 8, from the EXIF block; 1 if there is none, or a broken one, which does not make an image bad."""
    if image.format == "TIFF":
        return 1  # Pillow rotates these itself, and reports their size accordingly
    if image.format == "PNG" and not any(mark in data for mark in PNG_EXIF):
        return 1  # Pillow would decode the whole image to look for a block after it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001 (see above)
        return 1
    return orientation if orientation in TURNS else 1


def load_image(path: str | os.PathLike) -> "Image.Image":
    """A file's image in RGB. Raises UserError if the file is missing or not an image."""
    if "://" in str(path):
        raise UserError(f"--image={path}: URLs are not read; save the image and give its path")
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no image at {path}; check the path given with --image")
    try:
        return decode_image(path.read_bytes())
    except (BadSample, OSError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); convert it to PNG or JPEG") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an image becomes square tiles (InternVL's dynamic resolution).

    Attributes:
      size: S.
      min_tiles, max_tiles: limits of the grid, not counting the thumbnail.
      thumbnail: whether the whole image follows as one more tile if the grid has more than one.
    """

    size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def shared_by(self, images: int) -> "Tiling":
        """The tiling of each image of a sample with so many images, which share `max_tiles`."""
        return dataclasses.replace(self, max_tiles=max(1, self.max_tiles // max(images, 1)))

    def at_most(self, tiles: int) -> "Tiling":
        """The same with another `max_tiles`."""
        return dataclasses.replace(self, min_tiles=min(self.min_tiles, tiles), max_tiles=tiles)

    def within(self, tiles: int) -> "Tiling":
        """A tiling in which no image has more than so many tiles, its thumbnail included."""
        fewest, most = grid_within(self.min_tiles, self.max_tiles, self.thumbnail, tiles)
        return dataclasses.replace(self, min_tiles=fewest, max_tiles=most)

    def count(self, width: int, height: int) -> int:
        """Number of tiles of an image of this size, the thumbnail included."""
        columns, rows = self.grid(width, height)
        return columns * rows + (self.thumbnail and columns * rows > 1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) whose ratio is nearest to the image's; of two equally near, the later if the image is large.

        An image is large for a grid that has less than twice its pixels.
        """
        ratio, area = width / height, width * height
        best, best_difference = (1, 1), float("inf")
        for columns, rows in candidate_grids(self.min_tiles, self.max_tiles):
            difference = abs(ratio - columns / rows)
            if difference < best_difference:
                best, best_difference = (columns, rows), difference
            elif difference == best_difference and area > 0.5 * self.size**2 * columns * rows:
                best = (columns, rows)
        return best

    def cut(self, image: "Image.Image") -> np.ndarray:
        """A Pillow RGB image -> [n, S, S, 3] uint8: resized bicubically, tiles row by row, the thumbnail last."""
        from PIL import Image

        S, (columns, rows) = self.size, self.grid(*image.size)
        whole = (columns * S, rows * S)
        # Pillow would copy an image that has this size already.
        resized = image if image.size == whole else image.resize(whole, Image.Resampling.BICUBIC)
        pixels = np.asarray(resized, np.uint8).reshape(rows, S, columns, S, 3)
        count = columns * rows
        tiles = np.empty((count + (self.thumbnail and count > 1), S, S, 3), np.uint8)
        tiles[:count].reshape(rows, columns, S, S, 3)[:] = pixels.transpose(0, 2, 1, 3, 4)
        if len(tiles) > count:
            tiles[count] = np.asarray(image.resize((S, S), Image.Resampling.BICUBIC), np.uint8)
        return tiles


@functools.cache
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of min_tiles to max_tiles tiles, small ones first.

    Grids with equally many tiles come in the order of a Python set filled in this order, as in InternVL's code. The
    order decides between two that are equally near to an image's ratio.
    """
    sides = [(c, r) for n in range(min_tiles, max_tiles + 1) for c in range(1, n + 1) for r in range(1, n + 1)]
    return tuple(
        sorted({(c, r) for c, r in sides if min_tiles <= c * r <= max_tiles}, key=lambda grid: grid[0] * grid[1])
    )


def as_image(image: "Image.Image | np.ndarray") -> "Image.Image":
    """A Pillow image, from one or from [H, W, 3] uint8."""
    from PIL import Image

    return image if isinstance(image, Image.Image) else Image.fromarray(image)
