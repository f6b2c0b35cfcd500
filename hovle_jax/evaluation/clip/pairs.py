"""Images with texts about them, as retrieval asks for them: which texts are right for which images.

Letters: I images, T texts.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from hovle_jax.corpora.loading import source_path
from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.records import CAPTION_KEYS, parse
from hovle_jax.data.files.sources import Source
from hovle_jax.data.images import decode_image

SPLIT = "test"  # of folders that have several, unless one is named


@dataclasses.dataclass
class Pairs:
    """Rows of pairs, read one after another by `images`; all else is known when they are read.

    Attributes:
      sources: of the rows.
      texts: each text once.
      links: (image, text) that belong together.
      bad: rows that cannot be used.
    """

    sources: tuple[Source, ...]
    limit: int = 0
    texts: dict[str, int] = dataclasses.field(default_factory=dict)
    links: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    bad: list[BadEvent] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, data: str, limit: int, outside_root: bool, say: Callable[[str], None]) -> "Pairs":
        """Of any source that training reads. Raises UserError where there is none.

        Args:
          limit: only the first so many rows; 0 = all.
        """
        entries = open_mixture(source_path(data, SPLIT, say), SPLIT, outside_root)
        return cls(tuple(entry.source for entry in entries), limit)

    def __len__(self) -> int:
        """Rows."""
        count = sum(map(len, self.sources))
        return min(count, self.limit) if self.limit else count

    def images(self) -> Iterator[object | None]:
        """For each row its image, decoded; None where it is bad, or where a row before had the same image."""
        known, left = {}, len(self)
        for source in self.sources:
            for index in range(min(left, len(source))):
                try:
                    yield self._image(source, index, known)
                except BadSample as error:
                    self.bad.append(source.event(index, error.reason, error.detail))
                    yield None
            left -= min(left, len(source))

    def _image(self, source, index, known):
        row = source[index]
        record = parse(row, source.root, source.outside_root)
        if not record.images:
            raise BadSample("no_image", "the row has no image")
        texts = captions(row) or [answer.strip() for _, answer in record.turns[:1]]
        if not texts:
            raise BadSample("no_caption", f"none under {', '.join(CAPTION_KEYS)}")
        content = record.image_bytes(0)
        digest = hashlib.sha256(content).digest()
        image = None if digest in known else decode_image(content)
        number = known.setdefault(digest, len(known))
        for text in texts:
            self.links.append((number, self.texts.setdefault(text, len(self.texts))))
        return image

    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        """-> ([I], [T] int32): equal where an image and a text belong together, directly or through others.

        So a text that several images have is right for each of them, and each of them for it.
        """
        images = 1 + max((image for image, _ in self.links), default=-1)
        parents = list(range(images + len(self.texts)))

        def root(node):
            while parents[node] != node:
                parents[node] = parents[parents[node]]
                node = parents[node]
            return node

        for image, text in self.links:
            parents[root(images + text)] = root(image)
        found = np.asarray([root(node) for node in range(len(parents))], np.int32)
        return found[:images], found[images:]


def captions(row: object) -> list[str]:
    """All texts about a row's image, each once."""
    given = row if isinstance(row, dict) else {}
    values = next((given[key] for key in CAPTION_KEYS if isinstance(given.get(key), str | list) and given[key]), [])
    values = values if isinstance(values, list) else [values]
    texts = [" ".join(value.split()) for value in values if isinstance(value, str)]
    return list(dict.fromkeys(filter(None, texts)))
