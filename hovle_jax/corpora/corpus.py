"""What a corpus made of packages is."""

import collections.abc
import dataclasses


@dataclasses.dataclass(frozen=True)
class Corpus:
    """
    Attributes:
      version: part of the folder's name; another one whenever the rows change.
      description: a sentence on what is in it and how it is split.
      licence: of the corpus as a whole.
      packages: (Package, ...) that it is made of.
      rows: ({package's name: path of its archive}, track) -> {split: [row, ...]}. `track` passes a list's items on and
        says how far it is: it goes around the longest loop, which draws the pictures.
    """

    version: str
    description: str
    licence: str
    packages: tuple
    rows: collections.abc.Callable
