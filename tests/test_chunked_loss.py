"""The cross-entropy that holds a part of the vocabulary at a time: the same numbers, in a fraction of the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.training.losses.chunked import chunked_cross_entropy
from hovle_jax.training.losses.tokens import cross_entropy

TOKENS, VOCABULARY, WIDTH = 8192, 92_553, 64


def inputs(rows, length, width, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, length, width)).astype(np.float32)
    kernel = rng.normal(size=(width, columns)).astype(np.float32) / width**0.5
    targets = rng.integers(0, columns, (rows, length)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.5).astype(np.float32) * rng.random((rows, length)).astype(np.float32)
    return x, kernel, targets, weights


def plain(x, kernel, targets, weights, vocab_size):
    logits = jnp.where(jnp.arange(kernel.shape[1]) < vocab_size, x @ kernel, -1e30)
    return cross_entropy(logits, targets, weights)[0]


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 53, 200])
def test_numbers_are_those_of_whole_logits(chunk, keeps):
    x, kernel, targets, weights = inputs(2, 9, 16, 53)
    vocab_size = 50  # the last three columns are padding
    targets = targets % vocab_size

    def chunked(x, kernel):
        return chunked_cross_entropy(x, kernel, targets, weights, vocab_size, chunk, keeps=keeps)[0]

    of_whole = jax.value_and_grad(lambda x, kernel: plain(x, kernel, targets, weights, vocab_size), argnums=(0, 1))
    wanted = jax.jit(of_whole)(x, kernel)
    found = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    assert not found[1][1][:, vocab_size:].any()


def test_what_is_kept_in_bfloat16_is_as_near_as_what_is_made_again():
    """Of gradients in float32; also where nearly all of the probability is the target's, and little of it is left."""
    x, kernel, targets, _ = inputs(2, 32, 64, 4096)
    weights = np.ones(targets.shape, np.float32)
    kernel = kernel.astype(jnp.bfloat16)
    x = (x + 12 * np.asarray(kernel, np.float32).T[targets] * (np.arange(32) % 2)[:, None]).astype(jnp.bfloat16)
    wide = lambda array: jnp.asarray(array, jnp.float32)
    exact = jax.grad(lambda x, k: plain(x, k, targets, weights, 4096), argnums=(0, 1))(wide(x), wide(kernel))
    errors = {}
    for keeps in (False, True):
        loss = lambda x, k, keeps=keeps: chunked_cross_entropy(x, k, targets, weights, 4096, 1000, keeps=keeps)[0]
        found = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
        rows = lambda array: np.linalg.norm(array.reshape(-1, array.shape[-1]), axis=-1)
        errors[keeps] = np.asarray([np.quantile(rows(wide(f) - e) / rows(e), 0.9) for f, e in zip(found, exact)])
    assert np.all(errors[False] < 0.01) and np.all(errors[True] < 1.5 * errors[False]), errors


def test_memory_at_the_papers_vocabulary_is_an_eighth():
    shapes = [
        jax.ShapeDtypeStruct((2, TOKENS // 2, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.float32),
        jax.ShapeDtypeStruct((2, TOKENS // 2), jnp.int32),
        jax.ShapeDtypeStruct((2, TOKENS // 2), jnp.float32),
    ]

    def memory(loss):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = memory(lambda x, k, t, w: chunked_cross_entropy(x, k, t, w, VOCABULARY, 4096)[0])
    whole = memory(lambda x, k, t, w: plain(x, k, t, w, VOCABULARY))
    assert chunked <= whole / 8, (chunked, whole)


@pytest.mark.slow
def test_numbers_at_the_papers_vocabulary_are_those_of_whole_logits():
    """As many tokens and columns as the paper has; whole logits are made for a quarter of the tokens at a time, as
    their gradient would need 9 GB."""
    x, kernel, targets, weights = inputs(4, TOKENS // 4, WIDTH, VOCABULARY)
    whole = jax.jit(jax.value_and_grad(lambda *args: plain(*args, VOCABULARY), argnums=(0, 1)))
    quarters = [jax.device_get(whole(x[i : i + 1], kernel, targets[i : i + 1], weights[i : i + 1])) for i in range(4)]
    losses, parts = zip(*quarters)
    wanted = np.concatenate([dx for dx, _ in parts]), sum(dkernel for _, dkernel in parts)

    def chunked(x, kernel):
        return chunked_cross_entropy(x, kernel, targets, weights, VOCABULARY, 4096)[0]

    loss, found = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(x, kernel)
    np.testing.assert_allclose(loss, sum(losses), rtol=1e-5)
    for gradient, of_whole in zip(found, wanted):
        np.testing.assert_allclose(gradient, of_whole, rtol=0, atol=1e-5 * np.abs(of_whole).max())
