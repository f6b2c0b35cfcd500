"""Causal attention in blocks of queries: what XLA's CPU backend does fastest, as plain matmuls.

Dimension letters: B batch, L tokens, H heads, K kv heads, G = H / K, C head dim, S keys that a block may see.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

BLOCK = 64  # the fewest queries of a block: smaller matmuls lose more than the masked scores cost
SHORTEST = 2 * BLOCK  # rows for which blocks pay
BLOCKS = 4  # at most; halves of halves gain little


def attend_causal(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax attention of whole causal rows, in float32 with grouped key and value heads.

    A block of queries meets only the keys up to its last one, so that three eighths of the scores are never computed.
    The gradient is written out: it keeps the exponentials (not the probabilities and the scores) and is made of
    matmuls whose left side needs no transposition, which the CPU backend would do element by element.

    Args:
      query: [B, L, H, C].
      key, value: [B, L, K, C]; H is a multiple of K.
      allowed: [B, L, L] bool, False above the diagonal.
    Returns:
      [B, L, H, C] in the type of `query`.
    """
    B, L, H, C = query.shape
    K = key.shape[2]
    query = (query * C**-0.5).reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4)  # [B, K, G, L, C]
    out = _attend(query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), allowed)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def blocks(length: int) -> list[tuple[int, int]]:
    """[(first, end)] of the blocks of queries; a block of queries sees the keys up to `end`."""
    size = max(BLOCK, -(-length // BLOCKS))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


@jax.custom_vjp
def _attend(query, key, value, allowed):
    """query: [B, K, G, L, C]; key, value: [B, K, L, C]; allowed: [B, L, L]. -> [B, K, G, L, C]."""
    return _forward(query, key, value, allowed)[0]


def _forward(query, key, value, allowed):
    outs, scales, exponentials = [], [], []
    for first, end in blocks(query.shape[3]):
        rows = _rows(query, first, end)
        scores = jnp.einsum("bkrc,bksc->bkrs", rows, key[:, :, :end], preferred_element_type=jnp.float32)
        scores = _masked(scores, allowed[:, first:end, :end])
        powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        scale = 1 / jnp.sum(powers, axis=-1, keepdims=True)
        powers = powers.astype(value.dtype)
        out = jnp.einsum("bkrs,bksc->bkrc", powers, value[:, :, :end], preferred_element_type=jnp.float32)
        outs.append((out * scale).astype(query.dtype))
        scales.append(scale)
        exponentials.append(powers)
    out = _joined(outs, query.shape)
    return out, (query, key, value, out, scales, exponentials)


def _backward(saved, gradient):
    query, key, value, out, scales, exponentials = saved
    L = key.shape[2]
    d_query: list = []
    d_key: Any = 0
    d_value: Any = 0
    for (first, end), scale, powers in zip(blocks(L), scales, exponentials):
        rows, d_out = _rows(query, first, end), _rows(gradient, first, end)
        # Probabilities are powers * scale: the scale goes into the narrow [rows, C], not into the wide [rows, S].
        d_out = (d_out * scale).astype(query.dtype)
        mean = jnp.sum(d_out.astype(jnp.float32) * _rows(out, first, end), axis=-1, keepdims=True)
        d_powers = jnp.einsum("bkrc,bksc->bkrs", d_out, value[:, :, :end], preferred_element_type=jnp.float32)
        d_scores = (powers * (d_powers - mean)).astype(query.dtype)
        d_query.append(jnp.einsum("bkrs,bksc->bkrc", d_scores, key[:, :, :end]))
        padding = ((0, 0), (0, 0), (0, 0), (0, L - end))
        d_key += jnp.pad(jnp.einsum("bkrc,bkrs->bkcs", rows, d_scores), padding)
        d_value += jnp.pad(jnp.einsum("bkrc,bkrs->bkcs", d_out, powers), padding)
    d_key, d_value = d_key.transpose(0, 1, 3, 2), d_value.transpose(0, 1, 3, 2)
    # Without the barrier what reads the results, element by element, would be fused with how they are put together.
    return *optimization_barrier((_joined(d_query, query.shape), d_key, d_value)), None


_attend.defvjp(_forward, _backward)


def _rows(x, first, end):
    """A block of [B, K, G, L, C] with the queries that share a kv head as rows of one matrix: [B, K, G * n, C]."""
    B, K, G, _, C = x.shape
    return x[:, :, :, first:end].reshape(B, K, G * (end - first), C)


def _joined(parts, shape):
    """The inverse of `_rows` over all blocks: [B, K, G, L, C]."""
    B, K, G, _, C = shape
    return jnp.concatenate([part.reshape(B, K, G, -1, C) for part in parts], axis=3)


def _masked(scores, allowed):
    """scores: [B, K, G * n, S]; allowed: [B, n, S]."""
    B, K, _, S = scores.shape
    grouped = scores.reshape(B, K, -1, allowed.shape[1], S)
    return jnp.where(allowed[:, None, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape)
