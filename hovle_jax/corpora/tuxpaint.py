"""Tux Paint's stamps: photographs and drawings with a sentence in English and in up to 77 other languages.

From the Debian package `tuxpaint-stamps-default`. The sentences of a stamp `NAME.png` or `NAME.svg` are in `NAME.txt`.
"""

import io
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from hovle_jax.corpora.corpus import PackageCorpus
from hovle_jax.corpora.drawing import encode_png, flatten, rasterise
from hovle_jax.corpora.packages import Package, members
from hovle_jax.corpora.questions import conversation, is_held_out, pick, pick_translation

SVG_SIDE = 512  # pixels of the longer side; PNG stamps keep their size
STAMPS = "usr/share/tuxpaint/stamps/"
LEFT_OUT = "symbols/alphabets/"  # single letters
MANNERS = ("cartoon", "toys", "plastic")  # folders that say how a thing is shown, not what it is
PLACES = {"naturalforces": "natural forces"}  # folders whose names are not words
PACKAGE = Package(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2",
    161,
)
ASK_CAPTION = ("What does the picture show?", "What is this?", "Describe the picture.", "What do you see?")
ASK_PLACE = ("Which category does it belong to?", "In which category would you look for it?")
ASK_LANGUAGE = ("What does the picture show? Answer in {}.", "Describe the picture in {}.")


def parse_captions(data: bytes) -> tuple[str, dict[str, str]]:
    """A stamp's .txt -> (English, {locale: text}).

    The first line is English, each further one `LOCALE.utf8=TEXT`. White space is normalised.
    """
    english, *lines = data.decode("utf-8-sig").splitlines() or [""]
    captions = {}
    for line in lines:
        locale, separator, text = line.partition(".utf8=")
        if separator and text.strip():
            captions[locale.strip()] = " ".join(text.split())
    return " ".join(english.split()), captions


def read_stamps(archive: str | os.PathLike) -> list[tuple[str, bytes, str, dict[str, str]]]:
    """-> [(name, image file, english, captions), ...], ordered by name: the path below STAMPS, without its ending.

    Letters, stamps without a sentence (mirrored copies of others) and second copies of an image are left out. Of a
    stamp that is both SVG and PNG, the SVG is taken, or the PNG if the SVG has text, which needs fonts.
    """
    files = {}
    for name, data in members(archive, _is_wanted):
        path = pathlib.PurePosixPath(name.removeprefix(STAMPS))
        files.setdefault(str(path.with_suffix("")), {})[path.suffix] = data
    stamps, seen = [], set()
    for name, found in sorted(files.items()):
        image = found.get(".svg") or found.get(".png")
        if ".png" in found and b"<text" in found.get(".svg", b""):
            image = found[".png"]
        english, captions = parse_captions(found.get(".txt", b""))
        if image and english and image not in seen:
            seen.add(image)
            stamps.append((name, image, english, captions))
    return stamps


def _is_wanted(name):
    return (
        name.startswith(STAMPS) and not name.startswith(STAMPS + LEFT_OUT) and name.endswith((".png", ".svg", ".txt"))
    )


def draw(data: bytes) -> Image.Image:
    """A stamp's file -> an RGB image on white."""
    if data.startswith(b"\x89PNG"):
        return flatten(Image.open(io.BytesIO(data)))
    return rasterise(data, SVG_SIDE)


def ask(name: str, english: str, captions: dict[str, str], category: list[str]) -> list[dict[str, str]]:
    """A conversation: what the stamp shows, in English and in another language, and its category."""
    pairs = [(pick(ASK_CAPTION, "caption", name), english)]
    pairs.append((pick(ASK_PLACE, "place", name), PLACES.get(category[0], category[0])))
    translation = pick_translation(english, captions, name)
    if translation:
        language, text = translation
        pairs.append((pick(ASK_LANGUAGE, "language wording", name).format(language), text))
    return conversation(pairs, name)


def make_row(name: str, data: bytes, english: str, captions: dict[str, str]) -> dict[str, Any]:
    image = draw(data)
    folders = name.split("/")[:-1]
    category = [folder for folder in folders if folder not in MANNERS]
    row = {"id": name, "image": encode_png(image), "width": image.width, "height": image.height, "caption": english}
    row |= {"conversations": ask(name, english, captions, category), "captions": captions, "category": category}
    return row | {"manner": [folder for folder in folders if folder in MANNERS]}


def make_rows(archives: dict[str, pathlib.Path], track: Callable[[list], Iterable]) -> dict[str, list[dict]]:
    """`PackageCorpus.rows`: a tenth of the stamps is the test split."""
    rows = {"train": [], "test": []}
    for stamp in track(read_stamps(archives[PACKAGE.name])):
        row = make_row(*stamp)
        rows["test" if is_held_out(row["id"]) else "train"].append(row)
    return rows


CORPUS = PackageCorpus(
    version="1.0",
    description=(
        "Tux Paint's stamps on white, each with a sentence in English and in up to 77 other languages. `test`: one in "
        "ten, by name."
    ),
    licence="GPL-2",
    packages=(PACKAGE,),
    rows=make_rows,
)
