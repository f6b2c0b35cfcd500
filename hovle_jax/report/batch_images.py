"""Draws a batch as a person would check it: the images beside the text, the tokens that count in the loss marked.

Letters: B batch, L tokens, M tiles, S side of a tile, P visual tokens per tile.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

WIDTH = 1000
MARGIN = 16
FONT_SIZE = 15
LINE_HEIGHT = 25
MAX_LINES = 24  # of one row; a row of 32k tokens would make an image that no viewer opens
TILE_SIDES = {1: 192, 2: 128, 3: 96}  # columns of tiles -> side in pixels

Batch: TypeAlias = Mapping[str, np.ndarray]
Decode: TypeAlias = Callable[[list[int]], list[str]]

INK, FAINT, PAPER, RULE = "#1b1b1b", "#77777c", "#ffffff", "#d8d8dc"
FILLS = {"plain": "#f1f1f3", "image": "#d5e3f5", "trained": "#ffd978", "mismatch": "#f6a5a0"}
LEGEND = {
    "plain": "text",
    "image": "image tokens",
    "trained": "counts in the loss",
    "mismatch": "target is not the next token",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of text: a token, or a run of image tokens.

    Attributes:
      kind: 'plain', 'image', 'trained' (it counts in the loss) or 'mismatch' (the target is another token).
    """

    text: str
    kind: str
    segment: int = 1


Line: TypeAlias = list[tuple[int, int, Piece]]  # (x, box width, piece)


def batch_image(batch: Batch, decode: Decode, path: str | os.PathLike, rows: int = 8) -> pathlib.Path:
    """Draws the first rows of a batch of any stage.

    Args:
      batch: numpy arrays, as `data.batch` lays them out.
      decode: ids -> the text of each id.
      path: the PNG to write.
      rows: the most rows to draw.

    Returns:
      the path.
    """
    from PIL import Image, ImageDraw

    count = min(rows, len(batch["tokens"]))
    pieces = [row_pieces(batch, i, decode) for i in range(count)]
    tiles = [row_tiles(batch, i) for i in range(count)]
    num_columns = min(3, max(map(len, tiles)))
    side = TILE_SIDES.get(num_columns, 0)
    text_left = MARGIN + num_columns * (side + 6) + (MARGIN if num_columns else 0)
    layouts = [wrap(row, WIDTH - MARGIN - text_left) for row in pieces]
    kinds = [kind for kind in FILLS if any(piece.kind == kind for row in pieces for piece in row)]

    heights = [_row_height(layout, len(images), num_columns, side) for layout, images in zip(layouts, tiles)]
    canvas = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE_HEIGHT + sum(heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_legend(draw, kinds)
    top = MARGIN + LINE_HEIGHT
    for layout, images, height in zip(layouts, tiles, heights):
        draw.line((MARGIN, top, WIDTH - MARGIN, top), fill=RULE)
        for i, image in enumerate(images):
            row, column = divmod(i, num_columns)
            canvas.paste(_resize(image, side), (MARGIN + column * (side + 6), top + MARGIN + row * (side + 6)))
        _draw_text(draw, layout, text_left, top + MARGIN)
        top += height
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def row_tiles(batch: Batch, row: int) -> list[np.ndarray]:
    """The tiles that a row uses, each [S, S, 3]."""
    if "tiles" not in batch:
        return []
    tiles = np.asarray(batch["tiles"][row])
    if "image_positions" not in batch:
        return list(tiles)
    length = len(batch["tokens"][row])
    positions = np.asarray(batch["image_positions"][row]).reshape(len(tiles), -1)  # [M, P]
    return [tile for tile, used in zip(tiles, (positions < length).any(axis=1)) if used]


def row_pieces(batch: Batch, row: int, decode: Decode) -> list[Piece]:
    """The boxes of one row, without its padding.

    Where loss_weights[i] > 0, position i is trained to predict targets[i], so the box of token i + 1 is marked.
    Distillation compares a position with itself: there the box of token i is marked.
    """
    tokens = np.asarray(batch["tokens"][row])
    segments = np.asarray(batch["segment_ids"][row]) if "segment_ids" in batch else _caption_segments(tokens)
    image, trained = _image_mask(batch, row), _trained_mask(batch, row)
    targets = _targets(batch, row)
    texts = [_visible(text) for text in decode(tokens.tolist())]
    target_text = lambda i: f"target: {_visible(decode([int(targets[i])])[0])}"
    boxes = []
    for i in np.flatnonzero(segments > 0):
        kind = "trained" if trained[i] else "image" if image[i] else "plain"
        text = texts[i]
        if targets[i] not in (-1, tokens[i]):
            kind, text = "mismatch", f"{text} ({target_text(i)})"
        boxes.append((Piece(text, kind, int(segments[i])), bool(image[i])))
    pieces = _collapse(boxes)
    # A target after the end of the text has no box of its own.
    for i in np.flatnonzero((targets >= 0) & (np.append(segments, 0) == 0)):
        pieces.append(Piece(f"(past the end, {target_text(i)})", "mismatch", int(segments.max())))
    return pieces


def wrap(pieces: Iterable[Piece], width: int) -> list[Line]:
    """Lines of boxes, none wider than `width`; every segment starts a new line."""
    lines: list[Line] = [[]]
    x, segment = 0, None
    for piece in pieces:
        if segment is not None and piece.segment != segment:
            lines.append([])
            x = 0
        segment = piece.segment
        for fitting in _split(piece, width):
            box = _text_width(fitting.text) + 8
            if x and x + box > width:
                lines.append([])
                x = 0
            lines[-1].append((x, box, fitting))
            x += box + 3
    if len(lines) > MAX_LINES:
        left_out = sum(map(len, lines[MAX_LINES - 1 :]))
        note = Piece(f"... and {left_out} more boxes", "plain")
        lines = lines[: MAX_LINES - 1] + [[(0, _text_width(note.text) + 8, note)]]
    return lines


def _targets(batch, row):
    """[L + 1]: the target of the box at i; -1 = it does not count in the loss."""
    length = len(batch["tokens"][row])
    wanted = np.full(length + 1, -1)
    if "targets" in batch:
        weights = np.asarray(batch["loss_weights"][row])
        wanted[1:] = np.where(weights > 0, batch["targets"][row], -1)
    return wanted


def _trained_mask(batch, row):
    """[L]: whether a box counts in the loss."""
    length = len(batch["tokens"][row])
    mask = _targets(batch, row)[:length] >= 0
    if "text_weights" in batch:
        mask = mask | (np.asarray(batch["text_weights"][row]) > 0)
    if "image_weights" in batch:
        positions = np.asarray(batch["image_positions"][row])
        counted = positions[(np.asarray(batch["image_weights"][row]) > 0) & (positions < length)]
        mask[counted] = True
    return mask


def _image_mask(batch, row):
    """[L]: whether a token is a visual one."""
    mask = np.zeros(len(batch["tokens"][row]), bool)
    if "image_positions" in batch:
        positions = np.asarray(batch["image_positions"][row])
        mask[positions[positions < len(mask)]] = True
    return mask


def _caption_segments(tokens):
    """Contrast has no segment ids: a caption is followed by zeros or by more of its end token."""
    used = np.trim_zeros(tokens, "b")
    while len(used) > 1 and used[-1] == used[-2]:
        used = used[:-1]
    return (np.arange(len(tokens)) < len(used)).astype(np.int32)


def _collapse(boxes: list[tuple[Piece, bool]]) -> list[Piece]:
    """Joins neighbouring equal image tokens into one box, '<IMG_CONTEXT> x16'."""
    joined = []
    for (piece, is_image), run in itertools.groupby(boxes):
        count = len(list(run))
        if is_image and count > 1:
            joined.append(dataclasses.replace(piece, text=f"{piece.text} x{count}"))
        else:
            joined += [piece] * count
    return joined


def _split(piece: Piece, width: int) -> Iterator[Piece]:
    """The piece, split where it is too wide for a line."""
    text = piece.text
    while text:
        end = len(text)
        while end > 1 and _text_width(text[:end]) + 8 > width:
            end -= 1
        yield dataclasses.replace(piece, text=text[:end])
        text = text[end:]


def _visible(text):
    """The text with spaces as middle dots, and what the font cannot draw as code points."""
    text = text.replace(" ", "\u00b7").replace("\u2581", "\u00b7") or "(empty)"
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    return "".join(char if _has_glyph(char) else f"\\u{ord(char):04x}" for char in text)


@functools.cache
def _font():
    from PIL import ImageFont

    return ImageFont.load_default(size=FONT_SIZE)


@functools.cache
def _has_glyph(char):
    mask, missing = _font().getmask(char), _font().getmask("\uffff")
    # A Pillow core image can be read as bytes, which its stub lacks.
    same = mask.size == missing.size and bytes(mask) == bytes(missing)  # pyright: ignore[reportArgumentType]
    return char.isprintable() and not same


@functools.lru_cache(maxsize=100_000)
def _text_width(text):
    return int(np.ceil(_font().getlength(text)))


def _row_height(layout, num_tiles, num_columns, side):
    tile_rows = -(-num_tiles // num_columns) if num_columns else 0
    return max(len(layout) * LINE_HEIGHT, tile_rows * (side + 6)) + 2 * MARGIN


def _resize(tile, side):
    """Enlarged by a whole factor without smoothing, so that the model's pixels can be counted; reduced smoothly."""
    from PIL import Image

    image = Image.fromarray(np.asarray(tile))
    if image.width > side:
        return image.resize((side, side), Image.Resampling.LANCZOS)
    factor = side // image.width
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _draw_legend(draw, kinds):
    x = MARGIN
    for kind in kinds:
        draw.rounded_rectangle((x, MARGIN - 2, x + 16, MARGIN + 14), 3, fill=FILLS[kind])
        draw.text((x + 22, MARGIN + 6), LEGEND[kind], font=_font(), fill=FAINT, anchor="lm")
        x += 22 + _text_width(LEGEND[kind]) + 24


def _draw_text(draw, layout, left, top):
    for i, line in enumerate(layout):
        y = top + i * LINE_HEIGHT
        for x, width, piece in line:
            box = (left + x, y, left + x + width - 1, y + LINE_HEIGHT - 5)
            draw.rounded_rectangle(box, 3, fill=FILLS[piece.kind])
            draw.text((left + x + 4, y + LINE_HEIGHT // 2 - 2), piece.text, font=_font(), fill=INK, anchor="lm")
