"""How large the inputs of a model's products are: what int8 weights need to know (`weights.Int8Kernel`).

Which inputs of a product are large is a property of the model more than of the text: a few tokens drawn at random find
the same columns as real answers do, so that no data is needed.

Dimension letters: N layers, D inputs of a product.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hovle_jax.components import Params
from hovle_jax.inference.caches import LayerSlots, One
from hovle_jax.inference.layer import PRODUCTS, LayerWeights, run_layer
from hovle_jax.inference.weights import Int8Kernel, Kernel
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.rotary import needs_lengths, rotary_angles

TOKENS = 32  # of 4 times and 16 times as many nothing was gained

Sizes = dict[str, dict[str, jax.Array]]


@functools.partial(jax.jit, static_argnames="hovle")
def input_sizes(params: Params, *, hovle: HoVLE) -> Sizes:
    """Reads tokens that are drawn from the whole vocabulary, always the same.

    Args:
      params: {'embedding', 'llm'}, as they were trained.
    Returns:
      {'embedding', 'llm': {name of `layer.PRODUCTS`: [N, D] float32, root of the mean square}}.
    """
    llm = hovle.llm.bind({"params": params["llm"]})
    tokens = jax.random.randint(jax.random.key(0), (TOKENS,), 0, hovle.config.llm.vocab_size)
    sizes = {}
    if hovle.config.embedding is None:
        x = llm.token_embedding(tokens)
    else:
        embedding = hovle.embedding.bind({"params": params["embedding"]})
        stack, x = hovle.config.embedding.stack, embedding.embed_text(tokens)
        x, sizes["embedding"] = _read(stack, hovle.execution, params["embedding"], x)
        x = embedding.for_llm(x)
    _, sizes["llm"] = _read(hovle.config.llm.stack, hovle.execution, params["llm"], x)
    return sizes


class _Noting:
    """A kernel that notes how large its inputs are."""

    def __init__(self, kernel: Kernel | Int8Kernel):
        self._kernel, self.size = kernel, None

    def __call__(self, x):
        self.size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(x.ndim - 1))))
        return self._kernel(x)


def _read(config: StackConfig, execution: Execution, params: Params, x: jax.Array) -> tuple[jax.Array, Any]:
    """A component's layers over x [T, D] -> (x, sizes)."""
    if config.num_layers == 0:
        return x, {}
    positions = jnp.arange(TOKENS)[None]
    lengths = jnp.full_like(positions, TOKENS) if needs_lengths(config, TOKENS) else None
    angles, where = rotary_angles(positions, config, lengths), One(jnp.int32(0), jnp.int32(0), TOKENS)

    def read(x, layer):
        (weights,) = LayerWeights.of_stack(jax.tree.map(lambda leaf: leaf[None], layer), 1, execution.dtype)
        noting: dict[str, Any] = {name: _Noting(getattr(weights, name)) for name in PRODUCTS}
        cache = LayerSlots.empty(config, 1, TOKENS, execution.dtype)
        x, _ = run_layer(config, execution, dataclasses.replace(weights, **noting), x, cache, angles, where)
        return x, {name: kernel.size for name, kernel in noting.items()}

    x, sizes = jax.lax.scan(read, x[None].astype(execution.dtype), params["stack"]["layers"])
    return x[0], sizes
