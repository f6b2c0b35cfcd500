"""Prompts of classes: `{}` is the class's name. Sets by name, or files with one a line.

Radford et al. 2021, section 3.1.4: a class is described by several sentences, and the vectors are averaged. The sets
here are of our own wording; the lists that public suites were scored with are read as files.
"""

import difflib
import os
import pathlib
from collections.abc import Sequence

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.class_names import read_lines
from hovle_jax.system.printable import printable

PLACE = "{}"
OTHER_PLACE = "{c}"  # as CLIP_benchmark's files have it
SETS = {
    "plain": ("{}",),
    "simple": ("a photo of a {}.",),
    "seven": (
        "a photo of a {}.",
        "a good picture of one {}.",
        "a bad picture of one {}.",
        "a photo of a large {}.",
        "a photo of a small {}.",
        "a drawing of a {}.",
        "several {} in a picture.",
    ),
    "photos": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a sharp photo of a {}.",
        "a blurred photo of a {}.",
        "a bright photo of a {}.",
        "a dark photo of a {}.",
        "a photo of a {} from nearby.",
        "a photo of a {} from far away.",
        "a photo with a part of a {}.",
        "a black-and-white photo of a {}.",
    ),
    "drawings": (
        "a drawing of a {}.",
        "a sketch of a {}.",
        "a painting of a {}.",
        "a cartoon of a {}.",
        "an icon of a {}.",
        "a {} in a picture book.",
        "a toy that looks like a {}.",
        "a computer image of a {}.",
    ),
    "pets": ("a photo of a {}, which is a pet.", "a {} at home.", "somebody's pet, a {}."),
    "textures": ("a photo of a {} surface.", "a {} texture.", "something that looks {}."),
    "scenes": ("a photo taken at a {}.", "a place: {}.", "a view of a {}."),
    "satellite": ("a satellite image of {}.", "{} seen from above."),
    "actions": ("a photo of someone during {}.", "people and {}.", "an example of {}."),
    "digits": ('a picture of the number "{}".', 'the digit "{}", written by hand.'),
}
DEFAULT = "simple"


def find_templates(named: str) -> tuple[str, ...]:
    """The templates of a set of SETS, or of a file.

    Raises:
      UserError: there is neither, or a template has no place for the class.
    """
    named = named or DEFAULT
    if named in SETS:
        return SETS[named]
    if not pathlib.Path(named).is_file():
        near = difflib.get_close_matches(named, SETS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SETS)}, or a file"
        raise UserError(f"--templates={named}: there is no such set, and no file; {remedy}")
    templates = tuple(line.replace(OTHER_PLACE, PLACE) for line in read_lines(named))
    check_templates(templates, named)
    return templates


def check_templates(templates: Sequence[str], source: str | os.PathLike) -> None:
    """Raises UserError where there are none, or one has no place for the class's name."""
    if not templates:
        raise UserError(f"{source} has no templates; a line is one, as: a photo of a {PLACE}.")
    wrong = next((template for template in templates if PLACE not in template), None)
    if wrong is not None:
        raise UserError(f"{source}: the template {printable(wrong)!r} has no {PLACE} for the name of the class")


def prompts(name: str, templates: Sequence[str]) -> list[str]:
    """What is said of a class."""
    return [template.replace(PLACE, name) for template in templates]
