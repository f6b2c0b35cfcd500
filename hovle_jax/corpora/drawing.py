"""Images from files: SVG rasterised, transparency replaced by white, PNG encoded."""

import io
import types

from PIL import Image

from hovle_jax.errors import UserError


def check_rasteriser() -> types.ModuleType:
    """resvg-py. Raises UserError if this extra is missing, which is checked before anything is fetched."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError('SVG images need resvg-py; run: pip install "hovle_jax[corpora]"') from None
    return resvg_py


def rasterise(svg: bytes, longer_side: int) -> Image.Image:
    """An SVG file's bytes -> an RGB image on white, `longer_side` pixels wide or high.

    Text is left out: it would look different on each machine, depending on the installed fonts.
    """
    resvg = check_rasteriser()
    for side in ("width", "height"):  # the other side follows from the aspect ratio
        data = resvg.svg_to_bytes(
            svg_string=svg.decode("utf-8-sig"),
            skip_system_fonts=True,
            dpi=96,  # CSS's; without it, lengths in points or millimetres are ignored
            **{side: longer_side},
        )
        image = Image.open(io.BytesIO(data))
        if max(image.size) <= longer_side:
            break
    return flatten(image)


def flatten(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGB, with white for transparency."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """An image scaled to fill a white square, its aspect ratio unchanged."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return square


def encode_png(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
