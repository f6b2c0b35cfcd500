"""The bytes that a decoding step must read, as the engine holds them."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from hovle_jax.inference.engine import AHEAD, Engine
from hovle_jax.inference.weights import is_int8

COUNTED = "the weights of all layers and of the head, and the part of the caches that the step looks at, on one device"
LEFT_OUT = (
    "rows of the token tables, the tiles' projection (read with a prompt alone), activations, logits, what is written"
)


def weight_bytes(params: dict) -> int:
    """Of all layers and the head; second halves of a head in int8 are read of a few rows, and left out."""
    head = params["head"]
    return _bytes((params["layers"], head.coarse if is_int8(params) else head))


def cache_bytes(engine: Engine, prompt: int, long_prompt: int, answered: Iterable[int]) -> float:
    """Of all slots, the mean over steps. The engine's padded sizes count: it looks at no less.

    Args:
      prompt, long_prompt: tokens of each prompt in the LLM's stream and in the embedding's.
      answered: of each step, the tokens that its longest answer had.
    """
    state, answered = engine._state, list(answered)  # warming.py reaches into the engine, too
    looked_at = [
        _bytes(layers) * np.mean([engine._reach(layers, length + AHEAD + n) for n in answered]) / capacity
        for layers, length in ((state.embedding, long_prompt), (state.llm, prompt))
        if (capacity := engine._reach(layers, 2**30))
    ]
    return float(sum(looked_at))


def _bytes(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
