"""Features of labelled images, encoded once for each model and set of images and kept in the cache.

Letters: N images that can be read, D width of the image tower, E width of the common space.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.labelled import Labelled
from hovle_jax.inference.digests import component_digest
from hovle_jax.inference.encoder import Encoder
from hovle_jax.system.batching import batched
from hovle_jax.system.progress import track

PLACE = "features"  # the folder of the cache


@dataclasses.dataclass(frozen=True)
class Features:
    """Of labelled images.

    Attributes:
      pooled: [N, D] float32, before the projection.
      vectors: [N, E] float32 unit vectors.
      labels: [N] int32.
      names: of the classes.
      bad: images that cannot be read, or have no class.
    """

    pooled: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    bad: tuple[BadEvent, ...]


def features_of(
    encoder: Encoder, folder: str | os.PathLike, labelled: Labelled, say: Callable[[str], None] | None = None
) -> Features:
    """From the cache, or encoded now.

    Args:
      folder: that `encoder` was loaded from.
      say: called with lines of progress.
    Raises:
      UserError: none of the images can be read.
    """
    key = [component_digest(folder, "clip"), encoder.loaded.config.execution.dtype, _digest(labelled)]
    made = cached_arrays(key, lambda: _encoded(encoder, labelled, say), PLACE)
    bad = tuple(BadEvent(**event) for event in json.loads(made["bad"].tobytes()))
    if not len(made["kept"]):
        first = f"; the first: {bad[0].shard} {bad[0].sample}: {bad[0].detail}" if bad else ""
        raise UserError(f"{labelled.source}: none of {len(labelled):,} images can be read{first}")
    return Features(
        np.asarray(made["pooled"]), np.asarray(made["vectors"]), labelled.labels[made["kept"]], labelled.names, bad
    )


def _encoded(encoder, labelled, say):
    """The arrays of the cache."""
    items = enumerate(labelled.items)
    if say:
        items = track(items, say, f"features of {labelled.source}", "images", len(labelled))
    kept, bad, parts = [], [], [np.zeros((0, encoder.width("pooled")), np.float32)]
    for part in batched(items, encoder.rows):
        good = [(index, item.image) for index, item in part if not isinstance(item.image, BadEvent)]
        bad += [dataclasses.asdict(item.image) for _, item in part if isinstance(item.image, BadEvent)]
        kept += [index for index, _ in good]
        parts.append(encoder.images([image for _, image in good], "pooled"))
    pooled = np.concatenate(parts)
    made: dict[str, Any] = {"pooled": pooled, "vectors": encoder.projected(pooled)}
    text = json.dumps(bad).encode()
    return made | {"kept": np.asarray(kept, np.int64), "bad": np.frombuffer(text, np.uint8)}


def _digest(labelled):
    """Of what the images are: where they are, and of files their sizes and times."""
    digest = hashlib.sha256(repr((labelled.source, labelled.names)).encode())
    digest.update(np.ascontiguousarray(labelled.labels).tobytes())
    for index in range(len(labelled)):
        where = labelled.pictures.where(index)
        try:
            facts = os.stat(where[0])
            digest.update(repr((where, facts.st_size, facts.st_mtime_ns)).encode())
        except OSError:
            digest.update(repr(where).encode())
    return digest.hexdigest()
