"""What records need of a row, whatever the row's size: of one record, and of a whole source."""

import dataclasses

import numpy as np

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.data.files.sources import Source
from hovle_jax.data.images import Tiling


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one record needs, whatever the tiling.

    Attributes:
      text: tokens, not counting those of its tiles; of plain text all of them, even if they fill several rows.
      first: how many of these there are up to and including the first one that is learned.
      images_before: how many images come before that one.
      sizes: ((width, height), ...) of its images.
    """

    text: int
    first: int = 0
    images_before: int = 0
    sizes: tuple = ()


@dataclasses.dataclass(frozen=True)
class Costs:
    """`Needs` of the n samples of a source, as arrays, and the samples that cannot be used.

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

    def tiles(self, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
        """[n], [n] int64: tiles of each sample, and tiles that come before the first token that is learned."""
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

    def events(self, source: Source) -> list[BadEvent]:
        """The bad samples, as events before any step."""
        return [source.event(i, reason, detail) for i, reason, detail in self.bad]
