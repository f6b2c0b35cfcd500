"""Images that a command is given, classified one batch at a time."""

import dataclasses
import glob
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.images import decode_image
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.class_names import check_names, read_lines
from hovle_jax.evaluation.clip.classifiers import Classifier, best
from hovle_jax.evaluation.clip.labelled import is_image
from hovle_jax.system.batching import batched

SHOWN_SIDE = 320  # pixels of an image that is kept for a picture


@dataclasses.dataclass(frozen=True)
class Classified:
    """An image with the probabilities of all classes, or why it has none.

    Attributes:
      image: reduced, for a picture.
      probabilities: [C] float32.
    """

    path: str
    image: object = None
    probabilities: np.ndarray | None = None
    problem: str = ""

    def top(self, names: Sequence[str], count: int) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities."""
        assert self.probabilities is not None, self.problem
        return [(str(names[int(i)]), float(self.probabilities[i])) for i in best(self.probabilities, count)]


def find_labels(given: str) -> tuple[str, ...]:
    """'cat,dog', or a file with one a line -> names. Raises UserError for one given twice, or fewer than two."""
    from_file = pathlib.Path(given).is_file()
    names = read_lines(given) if from_file else tuple(name.strip() for name in given.split(",") if name.strip())
    check_names(names, given if from_file else "--labels")
    if len(names) < 2:
        raise UserError(f"--labels={given} leaves nothing to choose: give two or more, as --labels cat,dog")
    return names


def find_images(patterns: Sequence[str]) -> list[str]:
    """The files that patterns, paths and folders name, each once. Raises UserError for one that names none."""
    found = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            files = sorted(str(path) for path in pathlib.Path(pattern).iterdir() if is_image(path))
            if not files:
                raise UserError(f"--images={pattern}: the folder has no images; name files, as '{pattern}/*.jpg'")
        elif os.path.exists(pattern):
            files = [pattern]
        else:
            files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            if not files:
                raise UserError(f"--images={pattern}: no such file, and none that it stands for")
        found |= dict.fromkeys(files)
    return list(found)


def classify_files(classifier: Classifier, paths: Sequence[str], kept: int = 0) -> Iterator[Classified]:
    """Each image with its probabilities, in order; one that cannot be read says why.

    Args:
      kept: of so many images the first ones keep a small copy.
    """
    for part in batched(map(_Opened.read, paths, itertools.repeat(classifier)), classifier.at_once):
        good = [one.reduced for one in part if not one.problem]
        rows = iter(classifier.probabilities(good) if good else ())
        for one in part:
            image, kept = one.small if kept > 0 else None, kept - (not one.problem)
            yield Classified(one.path, image, None if one.problem else next(rows), one.problem)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What waits for its batch."""

    path: str
    reduced: object = None
    small: object = None
    problem: str = ""

    @classmethod
    def read(cls, path, classifier):
        try:
            image = decode_image(storage.read(path))
        except BadSample as error:
            return cls(path, problem=f"{error.reason}: {error.detail}")
        small = image.copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return cls(path, classifier.reduced(image), small)
