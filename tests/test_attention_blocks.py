"""Attention in blocks of queries is the plain attention, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.model.attention import AttentionMask, CausalRows, attend
from hovle_jax.model.attention_blocks import attend_causal, blocks

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def inputs(length, rows=2):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    # Two segments and padding in the first row, one segment in the second.
    segments = np.ones((rows, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, length - length // 5 :] = 0
    return arrays, AttentionMask.for_rows(jnp.asarray(segments)).dense()


def run(attention, arrays, allowed):
    """-> (output, gradients of query, key and value)."""
    *inputs, cotangent = arrays
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, allowed), *inputs)
    return out, *pullback(cotangent)


@pytest.mark.parametrize("length", [1, 40, 64, 150, 300])
def test_blocks_are_the_plain_attention(length):
    arrays, allowed = inputs(length)
    for plain, blocked in zip(run(attend, arrays, allowed), run(attend_causal, arrays, allowed)):
        np.testing.assert_allclose(blocked, plain, atol=2e-5)


def test_large_scores_stay_finite():
    arrays, allowed = inputs(100)
    arrays[0] = arrays[0] * 1e3
    for plain, blocked in zip(run(attend, arrays, allowed), run(attend_causal, arrays, allowed)):
        np.testing.assert_allclose(blocked, plain, rtol=1e-3, atol=1e-3 * float(jnp.abs(plain).max()))


def test_scores_of_later_keys_are_not_computed():
    """The largest matrix of scores is a block's, not [length, length]."""
    arrays, allowed = inputs(256)
    in_blocks = functools.partial(attend, implementation="blocks")
    text = jax.jit(lambda *arrays: run(in_blocks, arrays, CausalRows(allowed))).lower(*arrays).as_text()
    assert "256x256xf32" not in text and "128x256xf32" in text  # 64 queries of 2 heads


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 1000])
def test_blocks_cover_every_query_once(length):
    spans = blocks(length)
    assert [i for first, end in spans for i in range(first, end)] == list(range(length)) and len(spans) <= 4
