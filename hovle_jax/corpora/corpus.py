"""The definition of a corpus that is made of packages."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from hovle_jax.corpora.packages import Package


@dataclasses.dataclass(frozen=True)
class PackageCorpus:
    """A corpus that is made of packages, and how.

    Attributes:
      version: part of the folder's name; it changes whenever the rows change.
      description: what is in it and how it is split, in a sentence.
      licence: of the corpus as a whole.
      packages: what it is made of.
      rows: ({package's name: path of its archive}, track) -> {split: [row, ...]}. `track` wraps the list that the
        longest loop goes over, the one that draws the images, and reports its progress.
    """

    version: str
    description: str
    licence: str
    packages: tuple[Package, ...]
    rows: Callable[[dict[str, pathlib.Path], Callable[[list], Iterable]], dict[str, list[dict]]]
