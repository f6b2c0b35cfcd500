"""How a prompt is read in chunks: the index maps of both streams, cut to a few lengths so that few programs are compiled."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from hovle_jax.inference.slots import NOWHERE, Chunk


@dataclasses.dataclass(frozen=True)
class Streams:
    """A prompt as the two stacks read it, from a batch of one row.

    Attributes:
      tokens: [n] int32: what the LLM's stream has.
      long_tokens: [m] int32: what the embedding's has; HD: more visual tokens, else the same.
      visual: [m] int32: the visual vector in a place of the embedding's stream; `NOWHERE` for text.
      short_visual: [n] int32: HD: that of the LLM's stream, for text and for all of another variant `NOWHERE`.
      text: [n] int32: the place in the embedding's stream that a text token of the LLM's comes from.
      identity: [n] int64: equal where two prompts read the same: a text's id, or a hash of the image tile and the place.
    """

    tokens: np.ndarray
    long_tokens: np.ndarray
    visual: np.ndarray
    short_visual: np.ndarray
    text: np.ndarray
    identity: np.ndarray
