"""Losses, the learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.model.clip import MAX_LOG_SCALE
from hovle_jax.training.losses.contrastive import contrastive
from hovle_jax.training.losses.tokens import cosine, cross_entropy, divide
from hovle_jax.training.optimizer import learning_rate
from hovle_jax.training.stages.contrast import clamp_scale
from tests import micro
from tests.plain_losses import PLAIN
from tests.shared import golden_roots

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("folder", golden_roots("contrastive-loss"))
def test_contrastive_loss_is_that_of_pytorch_and_open_clip(folder, case, loss):
    arrays = np.load(folder / "expected.npz")
    get = lambda name: arrays[f"case{case}.{name}"]
    inputs = [get(n) for n in ("image_features", "text_features", "log_logit_scale", "logit_bias")]
    kind = {"softmax": "clip", "sigmoid": "siglip"}[loss]
    for of in (PLAIN[loss], lambda *inputs: divide(contrastive(*inputs, loss))):
        value, gradients = jax.value_and_grad(of, argnums=(0, 1, 2, 3))(*inputs)
        np.testing.assert_allclose(value, get(f"{kind}.loss"), rtol=1e-5, atol=1e-6)
        for name, gradient in zip(("image", "text", "log_logit_scale", "logit_bias"), gradients):
            key = f"case{case}.{kind}.grad_{name}"  # a softmax knows of no bias
            wanted = arrays[key] if key in arrays else 0
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("pairs, log_scale", [(1, 0.0), (2, 0.0), (6, 1.5), (9, np.log(100))])
def test_contrastive_loss_of_orthogonal_pairs(pairs, log_scale):
    """Each row of logits has the scale s once and 0 elsewhere: ln(1 + (N - 1) / e^s) for every pair."""
    unit = np.eye(16, dtype=np.float32)[:pairs]
    loss = divide(contrastive(unit, unit, jnp.float32(log_scale)))
    np.testing.assert_allclose(loss, np.log1p((pairs - 1) * np.exp(-np.exp(log_scale))), rtol=1e-4, atol=1e-6)


def test_the_logit_scale_is_clamped_at_100():
    clamped = clamp_scale({"clip": {"log_scale": jnp.float32(5.0), "other": 1}})["clip"]
    assert float(clamped["log_scale"]) == pytest.approx(np.log(100)) and clamped["other"] == 1
    assert float(clamp_scale({"clip": {"log_scale": jnp.float32(1.5)}})["clip"]["log_scale"]) == 1.5


@pytest.mark.slow
def test_a_step_clamps_the_logit_scale():
    state, batches, step = micro.start(micro.run_config("contrast"))
    # A start above the limit, which the update alone would not mend.
    state.trained["clip"]["log_scale"] = jnp.float32(9.0)
    state, _ = step(state, batches[0])
    assert float(state.trained["clip"]["log_scale"]) == pytest.approx(MAX_LOG_SCALE)


def test_cosine():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 7)).astype(np.float32)
    weights = np.asarray([1, 0, 2, 1, 0.5], np.float32)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    total, weight = cosine(x, y, weights)
    np.testing.assert_allclose(total, -(weights * cosines).sum(), rtol=1e-5)
    assert float(weight) == 4.5
    gradient = jax.grad(lambda x: cosine(x, y, weights)[0])(x)
    assert not gradient[1].any() and np.abs((gradient * x).sum(-1)).max() < 1e-5  # of length it knows nothing


@pytest.mark.parametrize("zero", ["prediction", "target", "both"])
def test_cosine_is_finite_at_zero_vectors(zero):
    x, y = jnp.ones((2, 4)), jnp.ones((2, 4))
    x = x.at[0].set(0) if zero != "target" else x
    y = y.at[0].set(0) if zero != "prediction" else y
    value, gradients = jax.value_and_grad(lambda x, y: cosine(x, y, jnp.ones(2))[0], argnums=(0, 1))(x, y)
    assert float(value) == pytest.approx(-1) and all(np.isfinite(g).all() for g in gradients)


def test_cross_entropy_counts_weighted_tokens_alone():
    logits = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    total, weight = cross_entropy(logits, np.asarray([[2, 4, 0]]), np.asarray([[1.0, 0.5, 0.0]]))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(total, -log_p[0, 0, 2] - 0.5 * log_p[0, 1, 4], rtol=1e-5)
    assert float(weight) == 1.5
    gradient = jax.grad(lambda pair: divide((pair, jnp.float32(0))))(jnp.float32(3))
    assert float(divide((total, jnp.float32(0)))) == 0 and float(gradient) == 0


def test_learning_rate_schedule():
    config = dataclasses.replace(
        micro.run_config("align").optimizer, learning_rate=2.0, warmup_steps=4, final_fraction=0.1
    )
    values = [float(learning_rate(config, 12)(i)) for i in range(13)]
    np.testing.assert_allclose(values[:5], [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose([values[8], values[12]], [0.2 + 0.9, 0.2], rtol=1e-6)
