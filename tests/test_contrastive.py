"""Contrastive training: the ring, its memory, batches that are read in microbatches, SigLIP's bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hovle_jax.components import fresh
from hovle_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
from hovle_jax.errors import UserError
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import checks
from hovle_jax.training.contrastive import contrastive
from hovle_jax.training.losses import divide
from hovle_jax.training.optimizer import decay_mask
from hovle_jax.training.step import eval_step, gradients
from tests import micro
from tests.plain_losses import PLAIN
from tests.trees import host

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = ("softmax", "sigmoid")
MESHES = {
    "one device": None,
    "data=8": MeshConfig(data=8),
    "data=2,fsdp=4": MeshConfig(data=2, fsdp=4),
    "data=1,fsdp=3": MeshConfig(data=1, fsdp=3),
    "data=2,fsdp=2,tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def mesh_of(name):
    config = MESHES[name]
    if config is None:
        return micro.one_device()
    size = config.data * config.fsdp * config.tensor
    return make_mesh(config, jax.devices()[:size])


def pairs(rows, width=16):
    """Unit vectors that are alike in pairs, a scale and a bias."""
    images, noise = np.random.default_rng(0).normal(size=(2, rows, width)).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit(images), unit(images + noise), np.float32(2.5), np.float32(-4)


def compiled(loss, placement, given, chunk):
    ring = placement.ring(len(given[0]))
    mean = lambda *given: divide(contrastive(*given, loss, ring, chunk))
    rows, whole = placement.sharding(ring.rows), placement.sharding()
    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)), in_shardings=(rows, rows, whole, whole))
    return step.lower(*given).compile()


@pytest.mark.parametrize(
    "mesh, rows, chunk",
    [
        ("one device", 24, 2**20),
        ("one device", 31, 100),  # chunks that do not divide the rows
        ("data=8", 8, 2**20),
        ("data=1,fsdp=3", 39, 50),
        ("data=2,fsdp=4", 264, 300),
        ("data=2,fsdp=2,tensor=2", 40, 2**20),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_ring_gives_the_plain_loss_and_its_gradients(loss, mesh, rows, chunk):
    given, placement = pairs(rows), Placement(mesh_of(mesh))
    value, found = jax.device_get(compiled(loss, placement, given, chunk)(*given))
    wanted_value, wanted = jax.value_and_grad(PLAIN[loss], argnums=(0, 1, 2, 3))(*given)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    for name, gradient, exact in zip(("images", "texts", "scale", "bias"), found, wanted, strict=True):
        largest = max(np.abs(exact).max(), 0.1 * (name == "bias"))  # which is rounding alone in a softmax
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_exist_a_block_at_a_time(loss):
    """64 devices hold 32,768 pairs: tests/benchmarks/contrastive_ring.py."""
    given, placement = pairs(4096, width=64), Placement(mesh_of("data=2,fsdp=4"))
    step = compiled(loss, placement, given, 2**16)
    vectors = 4096 // 8 * 64 * 4
    assert step.memory_analysis().temp_size_in_bytes < 8 * vectors + 6 * 4 * 2**16 < 4096 * 4096 // 8 * 4
    text = step.as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_rows_that_no_mesh_axis_divides_stay_whole():
    given, placement = pairs(9), Placement(mesh_of("data=8"))
    assert placement.ring(9).size == 1
    value, _ = compiled("softmax", placement, given, 2**20)(*given)
    np.testing.assert_allclose(value, PLAIN["softmax"](*given), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# In the train step


def config_of(loss="softmax", parts=1, rows=32, **changes):
    config = micro.run_config("contrast", data={"batch_size": rows}, **changes)
    clip = dataclasses.replace(config.clip, loss=loss)
    return dataclasses.replace(config, clip=clip, execution=ExecutionConfig(accumulate=parts))


def loss_and_gradients(config, mesh="one device"):
    run = micro.run(config, mesh_of(mesh))
    batch = run.placement.put_batch(micro.dataset(config)[0])
    take = jax.jit(lambda *given: gradients(*given, "contrast", run))
    (loss, _), grads = take(micro.params(config, run.placement.mesh), {}, batch)
    pair = eval_step(micro.params(config, run.placement.mesh), batch, stage="contrast", run=run)["loss"]
    np.testing.assert_allclose(divide(pair), loss, rtol=1e-5)
    return float(loss), host(grads)


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize(
    "loss, parts, rows, mesh",
    [
        ("softmax", 4, 32, "one device"),
        ("sigmoid", 4, 32, "one device"),
        ("softmax", 2, 32, "data=2,fsdp=4"),
        ("sigmoid", -1, 32, "data=2,fsdp=2,tensor=2"),
        pytest.param("softmax", 4, 256, "one device", marks=pytest.mark.slow),
        pytest.param("sigmoid", 4, 256, "one device", marks=pytest.mark.slow),
    ],
)
def test_a_batch_read_in_microbatches_is_compared_whole(loss, parts, rows, mesh):
    whole = loss_and_gradients(config_of(loss, rows=rows))
    assert_same(loss_and_gradients(config_of(loss, parts, rows), mesh), whole)
    assert np.abs(whole[1]["clip/log_scale"]) > 1e-4


def test_a_sigmoid_loss_has_a_bias_that_is_trained():
    config = config_of("sigmoid")
    run = micro.run(config)
    drawn = fresh(run.models.config, "clip", 0, run.abstract_params()["clip"])
    np.testing.assert_allclose([drawn["log_scale"], drawn["logit_bias"]], [np.log(10), -10], rtol=1e-6)
    state, batches, step = micro.start(config)
    before = float(state.trained["clip"]["logit_bias"])
    state, _ = step(state, batches[0])
    assert float(state.trained["clip"]["logit_bias"]) != before
    assert "logit_bias" not in micro.params(config_of())["clip"]  # a softmax has none


def test_gains_biases_and_the_scores_scale_and_bias_are_not_decayed():
    """Without gradients a step moves what is decayed, and nothing else."""
    config = config_of("sigmoid", optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5))
    params, optimizer = micro.params(config), micro.run(config).optimizer
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {name for name, leaf in host(updates).items() if np.any(leaf)}
    names = set(host(params))
    assert {"clip/log_scale", "clip/logit_bias", "clip/text/final_norm/norm/scale"} <= names - moved
    ends = ("kernel", "embedding", "position", "class_embedding", "class_position", "position_embedding")
    assert moved == {name for name in names if name.endswith(ends)}
    assert moved == {name for name, decays in host(decay_mask(params)).items() if decays}
    assert optax.tree.norm(updates) > 0


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="clip.loss='cosine': use one of softmax, sigmoid"):
        checks.check(config_of("cosine"))
