"""What changes no number: packing, layers written out or looped over, recomputation, any mesh."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from hovle_jax.aot.hlo.collectives import collectives
from hovle_jax.components import select
from hovle_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
from hovle_jax.data.batch import BatchShape, Sample, stack
from hovle_jax.data.text.conversation import IMAGE_MARK, encode_conversation, encode_random_text
from hovle_jax.errors import UserError
from hovle_jax.model import transformer
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.setup import accumulation
from hovle_jax.training.stages import STAGES
from hovle_jax.training.step import eval_step, gradients, microbatch, total_loss, train_step
from tests import micro
from tests.trees import assert_close, host

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = ("pre", "post", "none")


def conversations(config):
    """Six samples of different lengths; the second and the last have no image."""
    turns = [("what shape?", "circle"), ("hello, what is it?", "red"), ("describe the picture.", "a red circle")] * 2
    samples = []
    for i, (turn, example) in enumerate(zip(turns, micro.examples())):
        shown = i not in (1, 5)
        tiles = example.image[None] if shown else np.zeros((0, *example.image.shape), np.uint8)
        text = f"{IMAGE_MARK}\n{turn[0]}" if shown else turn[0]
        encoded = encode_conversation(
            micro.tokenizer(), [(text, turn[1])], "s", (1,) * shown, config.model.embedding.tokens_per_tile
        )
        samples.append(Sample(encoded.tokens, encoded.supervised, tiles))
    return samples


def random_texts(config):
    """Six samples of distillation, with different numbers of random ids."""
    samples, rng = [], np.random.default_rng(0)
    for count, example in zip((3, 1, 5, 2, 4, 6), micro.examples()):
        encoded = encode_random_text(micro.tokenizer(), rng, count, "s", (1,), config.model.embedding.tokens_per_tile)
        samples.append(Sample(encoded.tokens, encoded.supervised, example.image[None]))
    return samples


@pytest.mark.parametrize("stage, variant", [*itertools.product(["instruct"], VARIANTS), ("distill", "post")])
def test_packed_rows_give_the_loss_and_gradients_of_rows_of_their_own(stage, variant):
    config = micro.run_config(stage, variant)
    models = micro.models(config)
    kind = STAGES[stage].batch
    samples = (conversations if stage == "instruct" else random_texts)(config)
    longest = max(len(s.tokens) for s in samples)

    @jax.jit
    def losses(params, batch):
        def total(params):
            pairs = STAGES[stage].losses(models, params, batch)
            return sum(pair[0] for pair in pairs.values()), pairs

        return jax.grad(total, has_aux=True)(params)

    results = []
    for per_row in (1, 3):
        data = dataclasses.replace(config.data, sequence_length=per_row * longest, tiles=per_row)
        shape = BatchShape.of(data, config.model.embedding, micro.tokenizer().image_id)
        batch = stack([kind.row(samples[i : i + per_row], shape) for i in range(0, len(samples), per_row)])
        assert len(batch["tokens"]) == 6 // per_row
        results.append(losses(micro.params(config), batch))
    (grads, pairs), (packed_grads, packed_pairs) = results
    for name, (total, weight) in pairs.items():
        assert float(weight) == float(packed_pairs[name][1]) > 0
        np.testing.assert_allclose(packed_pairs[name][0], total, rtol=1e-5)
    assert_close(grads, packed_grads)


# ---------------------------------------------------------------------------------------------------------------------
# Execution: layers written out or looped over, recomputed or not, on any mesh


def gradients_of(run, stage):
    def of(params, batch):
        trains = lambda path: STAGES[stage].trains(path, run.models.config)
        trained, frozen = select(params, trains), select(params, lambda path: not trains(path))
        (loss, _), grads = jax.value_and_grad(total_loss, has_aux=True)(trained, frozen, batch, stage, run.models)
        return loss, grads

    return jax.jit(of)


@functools.cache
def reference(config):
    """(loss, gradients) on one device."""
    return jax.device_get(gradients_of(micro.run(config), config.stage)(micro.params(config), micro.dataset(config)[0]))


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(unroll_layers=True),
        ExecutionConfig(remat="full"),
        ExecutionConfig(remat="dots"),
        ExecutionConfig(remat="offload"),
        ExecutionConfig(remat=transformer.MATMULS),
        ExecutionConfig(remat="query, gate, layer_input@host", attention="blocks"),
        ExecutionConfig(attention="blocks"),
    ],
)
def test_execution_changes_neither_parameters_nor_numbers(execution):
    config = micro.run_config("instruct")
    run = micro.run(dataclasses.replace(config, execution=execution))
    assert jax.tree.map(jnp.shape, micro.params(config)) == jax.tree.map(jnp.shape, run.abstract_params())
    loss, grads = gradients_of(run, config.stage)(micro.params(config), micro.dataset(config)[0])
    np.testing.assert_allclose(loss, reference(config)[0], rtol=1e-5)
    assert_close(reference(config)[1], grads)


MESHES = {
    "data=2,fsdp=4": MeshConfig(data=2, fsdp=4),
    "data=2,fsdp=2,tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data=4,sequence=2": MeshConfig(data=4, sequence=2),
    "fsdp=4,sequence=2": MeshConfig(data=1, fsdp=4, sequence=2),
}
SHARDED = [
    *itertools.product(STAGES, ["pre"], ["data=2,fsdp=4"]),
    *itertools.product(["contrast", "distill", "instruct"], ["pre"], ["fsdp=4,sequence=2"]),
    *itertools.product(["instruct", "distill"], ["pre"], ["data=2,fsdp=2,tensor=2"]),
    ("instruct", "post", "fsdp=4,sequence=2"),
    pytest.param("distill", "post", "fsdp=4,sequence=2", marks=pytest.mark.slow),
]


def assert_mesh_changes_no_number(config, execution, mesh):
    """The loss and the gradients of a step, laid over the mesh, are those of one device by `config.execution`."""
    run = micro.run(dataclasses.replace(config, execution=execution), mesh)
    batch = run.placement.put_batch(micro.dataset(config)[0])
    loss, grads = gradients_of(run, config.stage)(micro.params(config, mesh), batch)
    np.testing.assert_allclose(loss, reference(config)[0], rtol=1e-5)
    assert_close(reference(config)[1], grads)


@pytest.mark.parametrize("stage, variant, mesh_name", SHARDED)
def test_a_mesh_changes_no_number(stage, variant, mesh_name):
    config = micro.run_config(stage, variant)
    assert_mesh_changes_no_number(config, config.execution, make_mesh(MESHES[mesh_name]))


@pytest.mark.parametrize(
    "mesh_name, remat",
    [("data=2,fsdp=2,tensor=2", "none"), ("fsdp=4,sequence=2", "none"), ("data=2,fsdp=2,tensor=2", "full")],
)
def test_a_mesh_changes_nothing_of_the_chunked_loss(mesh_name, remat):
    config = micro.run_config("instruct")
    assert_mesh_changes_no_number(config, ExecutionConfig(vocab_chunk=48, remat=remat), make_mesh(MESHES[mesh_name]))


@pytest.mark.parametrize("stage", [pytest.param("distill", marks=pytest.mark.slow), "instruct"])
def test_a_batch_read_in_microbatches_gives_the_same_update(stage):
    """With the usual eps of 1e-8 Adam's first update is the sign of the gradient, which rounding turns around wherever
    the gradient is nothing but rounding. With an eps of 1 the update is as smooth as the (clipped) gradient, and at a
    rate of 1 the rounding of the parameters themselves hides nothing of it.

    A batch of other rows takes other matmul kernels, which round otherwise. The first norm's derivative multiplies that
    by the inverse of its input's size, so tokens get vectors of size 1: with 32**-0.5, as drawn, rounding alone reaches
    the bound on some processors."""
    smooth = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, weight_decay=0.1)
    config = micro.run_config(stage, optimizer=smooth)

    def params():
        is_table = lambda path: path[-1] == "embedding" and path[-2] in ("text_embedding", "token_embedding")
        drawn = flatten_dict(micro.params(config))
        return unflatten_dict({path: leaf * 32**0.5 if is_table(path) else leaf for path, leaf in drawn.items()})

    def run(parts):
        config_of_parts = dataclasses.replace(config, execution=ExecutionConfig(accumulate=parts))
        state, batches, step = micro.start(config_of_parts, drawn=params())
        state, metrics = step(state, batches[0])
        return host(state.trained), host(optax.tree_utils.tree_get(state.opt_state, "mu")), metrics

    (wanted, moments, metrics), before = run(1), host(params())
    assert max(np.abs(value - before[name]).max() for name, value in wanted.items()) > 1e-2
    scale = max(np.abs(value).max() for value in moments.values())
    found, parts_moments, parts_metrics = run(4)
    assert metrics.keys() == parts_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(parts_moments[name], moments[name], rtol=0, atol=1e-6 * scale, err_msg=name)


def step_gradients(config, run):
    """`gradients` compiled, with its arguments."""
    trains = lambda path: STAGES[config.stage].trains(path, run.models.config)
    params = micro.params(config, run.placement.mesh)
    given = select(params, trains), select(params, lambda path: not trains(path))
    given = *given, run.placement.put_batch(micro.dataset(config)[0])
    return jax.jit(lambda *given: gradients(*given, config.stage, run)).lower(*given).compile(), given


@pytest.mark.parametrize(
    "stage, parts, rows, mesh_config",
    [
        ("pretrain", 2, 8, MeshConfig(data=2, fsdp=2)),
        pytest.param("instruct", 4, 32, MeshConfig(data=2, fsdp=4), marks=pytest.mark.slow),
        pytest.param("distill", 2, 8, MeshConfig(data=2, fsdp=2), marks=pytest.mark.slow),
        pytest.param("instruct", 2, 8, MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param("instruct", 2, 8, MeshConfig(data=4, sequence=2), marks=pytest.mark.slow),
    ],
)
def test_copies_of_the_model_sum_their_gradients_once_a_step(stage, parts, rows, mesh_config):
    """Not once a microbatch: between slices of TPUs each sum goes through the data-centre network."""
    sizes = dataclasses.astuple(mesh_config)
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(sizes)])
    config = micro.run_config(stage, data=dict(batch_size=rows))
    chunk = 0 if stage == "distill" else 48
    run = micro.run(dataclasses.replace(config, execution=ExecutionConfig(accumulate=parts, vocab_chunk=chunk)), mesh)
    compiled, given = step_gradients(config, run)
    (loss, _), grads = compiled(*given)
    np.testing.assert_allclose(loss, reference(config)[0], rtol=1e-5)
    assert_close(reference(config)[1], host(grads))
    found = collectives(compiled.as_text(), mesh.size // mesh_config.data)
    beyond = [c for c in found if c.crosses_slices and c.operand_bytes > 8]  # more than a loss's weight
    shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(given[0]))
    if run.sums_once:
        assert {(c.kind, c.group_size) for c in beyond} == {("all-reduce", mesh_config.data)}
        assert sum(c.operand_bytes * c.times for c in beyond) <= shards + 64
    else:
        assert mesh_config.tensor > 1


def test_held_out_losses_are_read_in_the_parts_of_a_step():
    """Else they take the memory of a whole batch, of which a step needs a microbatch's."""
    config, sums, memory = micro.run_config("pretrain"), [], []
    for parts in (1, 4):
        run = micro.run(dataclasses.replace(config, execution=ExecutionConfig(accumulate=parts)))
        given = micro.params(config), run.placement.put_batch(micro.dataset(config)[0])
        compiled = eval_step.lower(*given, stage="pretrain", run=run).compile()
        sums.append(compiled(*given)["loss"])
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[0] > 2 * memory[1]
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-6)
    assert float(sums[0][1]) > 0


def test_microbatches_take_rows_of_every_device():
    take = lambda i: microbatch({"rows": jnp.arange(8)}, i, 2)["rows"].tolist()
    assert [take(0), take(1)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_batches_that_cannot_be_read_in_microbatches_are_refused():
    change = lambda stage, count: micro.run_config(stage, execution=ExecutionConfig(accumulate=count))
    placement = Placement(make_mesh(MeshConfig(data=2, fsdp=4)))
    with pytest.raises(UserError, match="batch_size=8 must divide into execution.accumulate=2 microbatches .*: use 16"):
        accumulation(change("instruct", 2), placement)


def test_parameters_moments_and_rows_are_really_sharded():
    # Steps that no other test has: the program is not there yet.
    config, mesh = micro.run_config("instruct", steps=7), make_mesh(MESHES["data=2,fsdp=2,tensor=2"])
    state, batches, step = micro.start(config, mesh)
    kernels = lambda tree: tree["llm"]["stack"]["layers"]["gate"]["kernel"]

    def check(state):
        for tree in (state.trained, *(optax.tree_utils.tree_get(state.opt_state, m) for m in ("mu", "nu"))):
            assert kernels(tree).sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
            assert kernels(tree).addressable_shards[0].data.shape == (2, 16, 32)

    check(state)
    compiled, batch = train_step._cache_size(), batches[0]
    rows = Placement(mesh).put_batch(batch)
    assert rows["tokens"].addressable_shards[0].data.shape == (2, config.data.sequence_length)
    for _ in range(2):
        state, _ = step(state, batch)
        check(state)
    assert train_step._cache_size() == compiled + 1  # once, not again for where the first step left its results


def test_constraints_reach_the_program():
    config, mesh = micro.run_config("instruct"), make_mesh(MESHES["data=4,sequence=2"])
    run, params = micro.run(config, mesh), micro.params(config, mesh)
    traced = jax.jit(lambda p, b: run.models.hovle.logits(p, b)).trace(params, micro.dataset(config)[0])
    text = traced.lower().as_text()
    # Before and after each of the two stacks: [B, L, D], rows over the data axes and L over `sequence`.
    assert text.count("sharding_constraint") == 4 == str(traced.jaxpr).count("sharding_constraint[")
    assert text.count('<@mesh, [{"data"}, {"sequence"}, {}]>') >= 4  # fsdp has one device


def test_meshes_and_batches_that_do_not_divide_fail_with_the_number():
    with pytest.raises(UserError, match="data=3, .* does not cover 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match="data.batch_size=30 must divide by 8 devices .*: use 32"):
        Placement(make_mesh(MeshConfig())).check_batch_shape(30, 64)
    with pytest.raises(UserError, match="data.sequence_length=31 must divide by 2 devices .*: use 32"):
        Placement(make_mesh(MeshConfig(sequence=2))).check_batch_shape(32, 31)
