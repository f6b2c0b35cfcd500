"""Vectors of classes, from their names in sentences; kept on disk for each model, so that they are made once.

A class's vector is normalise(mean over its sentences of normalise(text)): Radford et al. 2021, section 3.1.4.

Letters: C classes, T templates, E width of the common space.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.evaluation.clip.templates import prompts
from hovle_jax.inference.digests import component_digest, tokenizer_digest
from hovle_jax.inference.encoder import Encoder
from hovle_jax.system.progress import track

PLACE = "class_vectors"  # the folder of the cache
TEXTS_AT_ONCE = 2048  # whose vectors are in memory together


def class_vectors(
    encoder: Encoder,
    folder: str | os.PathLike,
    names: Sequence[str],
    templates: Sequence[str],
    say: Callable[[str], None] | None = None,
) -> np.ndarray:
    """[C, E] float32 unit vectors, from the cache or made now.

    Args:
      folder: that `encoder` was loaded from.
      say: called with lines of progress.
    """
    dtype = encoder.loaded.config.execution.dtype
    key = [component_digest(folder, "clip"), tokenizer_digest(folder), dtype, list(names), list(templates)]
    made = cached_arrays(key, lambda: {"vectors": made_vectors(encoder, names, templates, say)}, PLACE)
    return np.array(made["vectors"])  # a copy: the file may be replaced while it is mapped


def made_vectors(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], say: Callable[[str], None] | None = None
) -> np.ndarray:
    """[C, E] float32 unit vectors."""
    at_once = max(1, TEXTS_AT_ONCE // len(templates))
    parts = [names[start : start + at_once] for start in range(0, len(names), at_once)]
    if say:
        parts = track(parts, say, "class vectors", "classes", len(names), len)
    made = [_ensemble(encoder, part, templates) for part in parts]
    return np.concatenate(made) if made else np.zeros((0, encoder.config.projection_width), np.float32)


def _ensemble(encoder, names, templates):
    texts = [text for name in names for text in prompts(name, templates)]
    mean = encoder.texts(texts).reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)
