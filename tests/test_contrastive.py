"""Contrastive training: the ring, its memory, batches that are read in microbatches, SigLIP's bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hovle_jax.aot.hlo.collectives import collectives
from hovle_jax.components import fresh
from hovle_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
from hovle_jax.errors import UserError
from hovle_jax.model.clip_config import ResNetConfig
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import checks
from hovle_jax.training.losses.contrastive import contrastive
from hovle_jax.training.losses.tokens import divide
from hovle_jax.training.optimizer import decay_mask
from hovle_jax.training.stages import STAGES
from hovle_jax.training.stages.contrast import draw
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
        ("one device", 24, 256),
        ("one device", 31, 7),  # chunks that do not divide the rows
        ("data=8", 8, 256),
        ("data=1,fsdp=3", 39, 5),
        ("data=2,fsdp=4", 264, 10),
        ("data=2,fsdp=2,tensor=2", 40, 256),
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
    step = compiled(loss, placement, given, 128)
    vectors = 4096 // 8 * 64 * 4
    assert step.memory_analysis().temp_size_in_bytes < 8 * vectors + 6 * 4 * 2**16 < 4096 * 4096 // 8 * 4
    text = step.as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_rows_that_no_mesh_axis_divides_stay_whole():
    given, placement = pairs(9), Placement(mesh_of("data=8"))
    assert placement.ring(9).size == 1
    value, _ = compiled("softmax", placement, given, 4)(*given)
    np.testing.assert_allclose(value, PLAIN["softmax"](*given), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# In the train step


def config_of(loss="softmax", parts=1, rows=32, patch_dropout=0.0, frozen="", **changes):
    config = micro.run_config("contrast", data={"batch_size": rows}, **changes)
    clip = dataclasses.replace(config.clip, loss=loss, patch_dropout=patch_dropout, frozen=frozen)
    return dataclasses.replace(config, clip=clip, execution=ExecutionConfig(accumulate=parts))


def begun(config, mesh="one device"):
    """-> (set-up, first batch on the devices)."""
    run = micro.run(config, mesh_of(mesh))
    return run, run.placement.put_batch(micro.dataset(config)[0])


def loss_and_gradients(config, mesh="one device"):
    run, batch = begun(config, mesh)

    @jax.jit
    def take(params, batch):
        return gradients(params, {}, draw(run.models, batch, jax.random.key(3)), "contrast", run)

    (loss, _), grads = take(micro.params(config, run.placement.mesh), batch)
    return float(loss), host(grads)


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize(
    "loss, parts, rows, mesh, dropout",
    [
        ("sigmoid", 4, 32, "one device", 0.5),
        ("softmax", 2, 32, "data=2,fsdp=4", 0.5),
        pytest.param("softmax", -1, 32, "data=2,fsdp=2,tensor=2", 0, marks=pytest.mark.slow),
        pytest.param("softmax", 4, 256, "one device", 0.5, marks=pytest.mark.slow),
        pytest.param("sigmoid", 4, 256, "one device", 0, marks=pytest.mark.slow),
    ],
)
def test_a_batch_read_in_microbatches_is_compared_whole(loss, parts, rows, mesh, dropout):
    """Patches that are left out at random are the same when a microbatch is encoded again, and on any mesh."""
    whole = loss_and_gradients(config_of(loss, rows=rows, patch_dropout=dropout))
    assert_same(loss_and_gradients(config_of(loss, parts, rows, patch_dropout=dropout), mesh), whole)
    scalars = {name: gradient for name, gradient in whole[1].items() if not gradient.ndim}
    assert len(scalars) == 1 + (loss == "sigmoid") and all(np.abs(each) > 1e-4 for each in scalars.values())


def test_held_out_pairs_are_compared_whole_too():
    losses = []
    for parts in (1, 4):
        config = config_of(parts=parts)
        run, batch = begun(config)
        losses.append(divide(eval_step(micro.params(config), batch, stage="contrast", run=run)["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_patches_are_drawn_anew_for_each_image_and_step():
    run, batch = begun(config_of(patch_dropout=0.75))
    drawn = [np.asarray(draw(run.models, batch, jax.random.key(i))["patches"]) for i in (0, 1, 0)]
    assert drawn[0].shape == (32, 4)  # of 16
    assert all(len(set(kept)) == 4 and set(kept) <= set(range(16)) for kept in drawn[0])
    assert len({tuple(kept) for kept in drawn[0]}) > 16
    assert (drawn[0] != drawn[1]).any() and (drawn[0] == drawn[2]).all()
    assert "patches" not in draw(begun(config_of())[0].models, batch, jax.random.key(0))


def test_a_tower_sees_the_class_token_and_the_patches_that_are_kept():
    config = config_of()
    clip, params = micro.models(config)["clip"], micro.params(config)["clip"]
    tiles = micro.dataset(config)[0]["tiles"][:2, 0]
    encode = lambda tiles, patches: clip.apply({"params": params}, tiles, patches, method="encode_images")
    everything = encode(tiles, np.stack([np.arange(16), np.random.default_rng(0).permutation(16)]))
    np.testing.assert_allclose(everything, encode(tiles, None), atol=1e-5)  # in any order
    kept = np.tile(np.asarray([0, 1, 2, 3], np.int32), (2, 1))  # the first row of patches
    changed = tiles.copy()
    changed[:, 8:] = 0
    np.testing.assert_array_equal(encode(changed, kept), encode(tiles, kept))


def test_a_locked_tower_stays_as_it_was_loaded():
    """LiT: no gradient, no moments, no decay."""
    config = config_of(frozen="vision,log_scale")
    state, batches, step = micro.start(config)
    before = host(state.frozen)
    assert {name.split("/")[1] for name in before} == {"vision", "log_scale"}
    assert {name.split("/")[1] for name in host(state.trained)} == {"text", "text_projection", "vision_projection"}
    state, metrics = step(state, batches[0])
    assert all((leaf == before[name]).all() for name, leaf in host(state.frozen).items())
    assert metrics["gradient_norm"] > 0


def test_a_sigmoid_loss_has_a_bias():
    config = config_of("sigmoid")
    run = micro.run(config)
    drawn = fresh(run.models.config, "clip", 0, run.abstract_params()["clip"])
    np.testing.assert_allclose([drawn["log_scale"], drawn["logit_bias"]], [np.log(10), -10], rtol=1e-6)
    assert "logit_bias" not in micro.params(config_of())["clip"]  # a softmax has none


def test_gains_biases_and_the_scores_scale_and_bias_are_not_decayed():
    """Without gradients a step moves what is decayed, and nothing else."""
    config = config_of("sigmoid", optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5))
    params, optimizer = micro.params(config), micro.run(config).optimizer
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda params: optimizer.update(nothing, optimizer.init(params), params)[0])(params)
    moved = {name for name, leaf in host(updates).items() if np.any(leaf)}
    names = set(host(params))
    assert {"clip/log_scale", "clip/logit_bias", "clip/text/final_norm/norm/scale"} <= names - moved
    ends = ("kernel", "embedding", "position", "class_embedding", "class_position", "position_embedding")
    assert moved == {name for name in names if name.endswith(ends)}
    assert moved == {name for name, decays in host(decay_mask(params)).items() if decays}
    assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(loss="cosine"), "clip.loss='cosine': use one of softmax, sigmoid"),
        (dict(patch_dropout=1.0), "clip.patch_dropout=1.0 is a share of patches: from 0 to below 1"),
        (dict(frozen="vision,head"), "clip.frozen names head: use some of vision,text,"),
        (dict(frozen="text,vision"), "clip.frozen='text,vision' leaves no tower to be trained"),
        (dict(frozen="vision"), "clip.frozen='vision' stays as it is loaded, and vision would not be: set init.clip"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        checks.check(config_of(**changes))


def test_between_copies_of_the_model_each_block_of_vectors_travels_once_a_pass():
    """And the sum of the gradients once a step, not once a microbatch: there is the data-centre network."""
    config, mesh = config_of(parts=2), mesh_of("data=2,fsdp=4")
    run, batch = begun(config, "data=2,fsdp=4")
    params = micro.params(config, mesh)
    compiled = jax.jit(lambda *given: gradients(*given, {}, batch, "contrast", run)).lower(params).compile()
    beyond = [c for c in collectives(compiled.as_text(), 4) if c.crosses_slices]
    sent = {kind: sum(c.operand_bytes * c.times for c in beyond if c.kind == kind) for kind in {c.kind for c in beyond}}
    shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    block = 32 // 8 * config.clip.projection_width * 4
    assert sent["all-reduce"] <= shards + 64
    # Texts in both passes, their gradients there and back, and two numbers of each text in each.
    assert sent["collective-permute"] <= 4 * block + 32 // 8 * 4 * 8
    assert sent.keys() == {"all-reduce", "collective-permute"}


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm


def resnet_run(**changes):
    vision = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), num_heads=2)
    clip = dataclasses.replace(micro.clip_config(), vision=vision, batch_statistics=True)
    return micro.run_config("contrast", clip=clip, **changes)


def test_batch_norm_learns_by_each_batchs_statistics_and_keeps_those_of_the_end():
    config = resnet_run()
    state, dataset, step = micro.start(config)
    before = jax.device_get(state.frozen)
    state, losses = micro.trained(state, dataset, step)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen))  # the statistics wait
    models, batch = micro.models(config), micro.run(config).placement.put_batch(dataset[0])
    made = STAGES["contrast"].finish(models, state.params, iter([batch]))
    tower, tiles = models["clip"], batch["tiles"][:, 0]
    image = lambda params, **how: tower.apply({"params": params["clip"]}, tiles, method="encode_images", **how)
    np.testing.assert_allclose(image(made), image(state.params, of_batch=True), atol=2e-5)
    norm = made["clip"]["vision"]["norm1"]
    assert norm["batches"] == 1 and np.abs(norm["variance"] - 1).max() > 1e-3
    other = micro.run(config).placement.put_batch(dataset[1])
    several = STAGES["contrast"].finish(models, state.params, iter([batch, other]))
    assert several["clip"]["vision"]["norm1"]["batches"] == 2


def test_what_has_no_statistics_of_batches():
    with pytest.raises(UserError, match="clip.batch_statistics: a ViT has no batch norm"):
        dataclasses.replace(micro.clip_config(), batch_statistics=True).check()
    with pytest.raises(UserError, match="clip.batch_statistics: a frozen image tower keeps its own"):
        dataclasses.replace(resnet_run().clip, frozen="vision").check()
