"""What records need of a row, whatever its size: one record's, and those of a whole source."""

import dataclasses

import numpy as np

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.data.files.sources import Source
from hovle_jax.data.images import Tiling


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a record takes, whatever the tiling.

    Attributes:
      text: tokens beside those of its tiles; of plain text all of them, also where they fill several rows.
      first: how many of these there are up to the first one that is learned, which is counted too.
      images_before: images in front of that.
      sizes: ((width, height), ...).
    """

    text: int
    first: int = 0
    images_before: int = 0
    sizes: tuple = ()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Needs of the n samples of a source (`Needs`), and those that cannot be used.

    Attributes:
      text, first, images_before: [n]; text is 0 for a bad sample.
      size_ends: [n]; the images of sample i are sizes[size_ends[i - 1] : size_ends[i]].
      sizes: [k, 2] width, height.
      bad: ((i, reason, detail), ...).
    """

    text: np.ndarray
    first: np.ndarray
    images_before: np.ndarray
    size_ends: np.ndarray
    sizes: np.ndarray
    bad: tuple

    def tiles(self, tiling: Tiling):
        """[n], [n] int64: tiles of each sample, and of its images in front of what is learned first."""
        ends = np.asarray(self.size_ends, np.int64)
        images = np.diff(ends, prepend=0)
        owner = np.repeat(np.arange(len(images)), images)
        shared = images[owner]
        different, which = np.unique(
            np.concatenate([np.asarray(self.sizes, np.int64).reshape(-1, 2), shared[:, None]], axis=1),
            axis=0,
            return_inverse=True,
        )
        counts = np.asarray([tiling.shared_by(k).count(w, h) for w, h, k in different.tolist()], np.int64)[
            which.ravel()
        ]
        place = np.arange(len(owner)) - (ends - images)[owner]
        before = counts * (place < np.asarray(self.images_before)[owner])
        add = lambda values: np.bincount(owner, values, len(images)).astype(np.int64)
        return add(counts), add(before)

    def events(self, source: Source):
        """The bad samples, as those that were found before any step."""
        return [BadEvent(-1, source.name, *source.where(i), reason, detail) for i, reason, detail in self.bad]
