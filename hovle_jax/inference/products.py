"""Products with what decoding reads: weights and keys, each output's numbers in a row, by few vectors at a time."""

from typing import Any

import jax
import jax.numpy as jnp

FEW = 64  # vectors: those of decoding, and not those of a prompt


def product(x: jax.Array, kernel: jax.Array, result: Any) -> jax.Array:
    """x [..., M, D], kernel [..., F, D] -> [..., M, F] in the type `result`; the leading dimensions are the same."""
    few = x.shape[-2] <= FEW and jax.default_backend() == "cpu"
    return _few_on_a_cpu(x, kernel, result) if few else _dot(x, kernel, result)


def _dot(left, right, result):
    batch, last = tuple(range(left.ndim - 2)), (left.ndim - 1,)
    return jax.lax.dot_general(left, right, ((last, last), (batch, batch)), preferred_element_type=result)


def _few_on_a_cpu(x, kernel, result):
    """The same with the kernel as the left factor, which XLA's CPU backend reads almost twice as fast.

    The barrier keeps it there: without one the compiler takes the transpose away by turning the factors around. One
    vector that is not float32 takes ten times as long as two.
    """
    alone = x.shape[-2] == 1 and x.dtype != jnp.float32
    several = jnp.concatenate([x, x], axis=-2) if alone else x
    out = jax.lax.optimization_barrier(_dot(kernel, several, result))
    return jnp.swapaxes(out[..., :1] if alone else out, -1, -2)
