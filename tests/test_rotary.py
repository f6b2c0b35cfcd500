"""Dynamic NTK: rotary positions whose base grows with a text that is longer than the model was trained for."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.model.config import HoVLEConfig, RopeScaling
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.rotary import needs_lengths, rotary_angles, rotate, text_lengths
from hovle_jax.model.transformer import Stack, remat_policy
from tests.public_models import STACK, llm

pytestmark = pytest.mark.usefixtures("quick_compilation")

ORIGINAL, FACTOR = 8, 2.5
DYNAMIC = RopeScaling("dynamic", FACTOR, ORIGINAL)
SCALED = dataclasses.replace(STACK, rope_scaling=DYNAMIC)


def grown_base(length, stack=STACK):
    """InternLM2's `InternLM2DynamicNTKScalingRotaryEmbedding`, and transformers' 'dynamic', as a formula."""
    if length <= ORIGINAL:
        return stack.rope_theta
    C = stack.head_dim
    return stack.rope_theta * (FACTOR * length / ORIGINAL - (FACTOR - 1)) ** (C / (C - 2))


def angles_of(base, positions, C=STACK.head_dim):
    return np.asarray(positions)[..., None] / base ** (np.arange(0, C, 2) / C)


@pytest.mark.parametrize("length", [3, ORIGINAL, ORIGINAL + 1, 40, 3000])
def test_the_base_is_public_codes(length):
    positions = np.arange(length, dtype=np.int32)[None]
    cos, sin = rotary_angles(positions, SCALED, np.full_like(positions, length))
    expected, tolerance = angles_of(grown_base(length), positions), 1e-6 * max(length, 20)
    np.testing.assert_allclose(cos[:, :, 0], np.cos(expected), atol=tolerance)
    np.testing.assert_allclose(sin[:, :, 0], np.sin(expected), atol=tolerance)
    if length > ORIGINAL:  # the tolerance does tell bases apart
        assert np.abs(np.cos(expected) - np.cos(angles_of(STACK.rope_theta, positions))).max() > 100 * tolerance


def test_texts_of_a_packed_row_are_turned_by_their_own_lengths():
    lengths = (12, 5, 9)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 4)]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 3, 0], (*lengths, 4)).astype(np.int32)[None]
    cos, _ = rotary_angles(positions, SCALED, text_lengths(positions, segments))
    expected = np.concatenate([angles_of(grown_base(n), np.arange(n)) for n in lengths])
    np.testing.assert_allclose(cos[0, : sum(lengths), 0], np.cos(expected), atol=1e-5)


def model(**stack):
    return HoVLE(HoVLEConfig(None, llm("internlm2", **stack)))


def prompts(lengths):
    L = max(lengths)
    index = np.broadcast_to(np.arange(L, dtype=np.int32), (len(lengths), L))
    tokens = np.random.default_rng(0).integers(3, 40, index.shape).astype(np.int32)
    return {"tokens": tokens, "positions": index, "segment_ids": (index < np.array(lengths)[:, None]).astype(np.int32)}


@pytest.fixture(scope="module")
def params():
    row = np.zeros((1, 1), np.int32)
    tree = nn.meta.unbox(model().llm.init(jax.random.key(0), row, row, row)["params"])
    rng = np.random.default_rng(1)
    return {"llm": jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), tree)}


@pytest.mark.parametrize("length", [6, 12])
def test_prompts_and_answers_across_the_original_length(length, params):
    """Keys that are cached keep the base of the length at which they were read, as in public code."""
    batch, dynamic, new = prompts([length]), model(rope_scaling=DYNAMIC), 6
    with_base = lambda n: model(rope_theta=grown_base(n))
    full = dynamic.logits(params, batch)
    np.testing.assert_allclose(full, with_base(length).logits(params, batch), atol=2e-5)
    logits, cache = dynamic.prefill(params, batch, dynamic.empty_cache(1, length + new, 0))
    expected, reference = with_base(length).prefill(params, batch, dynamic.empty_cache(1, length + new, 0))
    for step in range(new):
        np.testing.assert_allclose(logits, expected, atol=5e-5, err_msg=f"step {step}")
        token, active = jnp.argmax(logits, -1).astype(jnp.int32), jnp.ones(1, bool)
        logits, cache = dynamic.decode(params, token, active, cache)
        expected, reference = with_base(length + step + 1).decode(params, token, active, reference)
    plain, _ = model().decode(params, token, active, reference)
    assert np.abs(plain - logits).max() > 1e-2


def test_a_row_does_not_depend_on_its_company(params):
    dynamic = model(rope_scaling=DYNAMIC)
    batch = prompts([13, 5, 10])
    prefill = jax.jit(dynamic.prefill)
    together, _ = prefill(params, batch, dynamic.empty_cache(3, 20, 0))
    for row, length in enumerate((13, 5, 10)):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        alone, _ = prefill(params, one, dynamic.empty_cache(1, 20, 0))
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


def test_within_the_original_length_nothing_is_added_to_the_program():
    """Training never goes beyond it: no lengths are computed there."""
    rows = np.zeros((2, ORIGINAL), np.int32)

    def program(stack):
        module = Stack(stack, Execution())
        run = lambda x: module.init_with_output(jax.random.key(0), x, rows, rows)[0]
        return str(jax.make_jaxpr(run)(jnp.zeros((*rows.shape, stack.width))))

    assert program(SCALED) == program(STACK)
    assert needs_lengths(SCALED, ORIGINAL + 1) and not needs_lengths(STACK, 3000)


def test_heads_too_small_to_stretch():
    with pytest.raises(UserError, match="head_dim of at least 4, not 2"):
        dataclasses.replace(SCALED, head_dim=2).check("stack")


def test_halves_that_a_matmul_moves_are_the_same():
    """To the last bit but where a product and a sum are rounded once: within one of bfloat16's steps."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, STACK.head_dim), jnp.bfloat16)
    angles = rotary_angles(jnp.arange(14).reshape(2, 7) * 5, STACK)

    def both(by_matmul):
        out, back = jax.vjp(lambda x: rotate(x, *angles, by_matmul=by_matmul), x)
        return out, back(jnp.flip(out))[0]

    for plain, moved in zip(both(False), both(True), strict=True):
        assert moved.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(moved), np.float32(plain), rtol=2**-7, atol=2**-8)
    wide = x.astype(jnp.float32)  # a TPU's matmul would round it
    np.testing.assert_array_equal(rotate(wide, *angles, by_matmul=True), rotate(wide, *angles))


def test_remat_dots_does_not_keep_the_permutation_of_a_rotation():
    """In float32 it would take as much memory as both queries and keys do."""
    x, kernel = jnp.ones((1, 8, 2, 16), jnp.bfloat16), jnp.ones((16, 16), jnp.bfloat16)
    angles = (jnp.ones((1, 8, 1, 8)), jnp.ones((1, 8, 1, 8)))
    layer = lambda x: jnp.sin(rotate(x @ kernel, *angles, by_matmul=True)).sum(dtype=jnp.float32)
    _, backward = jax.vjp(jax.checkpoint(layer, policy=remat_policy("dots")), x)
    kept = [leaf.dtype for leaf in jax.tree.leaves(backward) if leaf.shape == x.shape]
    assert kept == [jnp.bfloat16]  # what it is made of
