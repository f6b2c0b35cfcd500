"""Pictures from their files: SVG rasterised, transparency laid on white, PNG written."""

import io

from PIL import Image

from hovle_jax.errors import UserError


def check_rasteriser():
    """Raises UserError where resvg-py, an extra, is missing: to be known before anything is fetched."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError('SVG pictures need resvg-py; run: pip install "hovle_jax[corpora]"') from None
    return resvg_py


def rasterise(svg, longer_side):
    """An SVG file's bytes -> RGB picture on white whose longer side is as given.

    Text in it is left out: it would look different on each machine, by the fonts that are installed.
    """
    resvg = check_rasteriser()
    for side in ("width", "height"):  # the other one follows from the proportions
        data = resvg.svg_to_bytes(
            svg_string=svg.decode("utf-8-sig"),
            skip_system_fonts=True,
            dpi=96,  # CSS's; without it lengths in points or millimetres count as nothing
            **{side: longer_side},
        )
        picture = Image.open(io.BytesIO(data))
        if max(picture.size) <= longer_side:
            break
    return flatten(picture)


def flatten(picture):
    """Any mode -> RGB, on white where it is transparent."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def fit_square(picture, side):
    """Scaled to fill a white square, without changing its proportions."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return square


def encode_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
