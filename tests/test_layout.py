"""Where a run's arrays lie: levels of ZeRO, frozen kernels in the compute type, the table beside a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from hovle_jax import checkpoints
from hovle_jax.config import ExecutionConfig, MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.model.hovle import HoVLECache
from hovle_jax.sharding import table
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import loop
from hovle_jax.training.checks import check_execution
from hovle_jax.training.setup import accumulation
from hovle_jax.training.stages import STAGES
from hovle_jax.training.weights import save_result
from tests import micro
from tests.trees import assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")

FSDP = MeshConfig(data=1, fsdp=8)


def one_step(config, mesh_config, execution):
    """-> (shardings of the state before it, the state after it, metrics) of a micro run on eight devices."""
    state, batches, step = micro.start(dataclasses.replace(config, execution=execution), make_mesh(mesh_config))
    before = micro.shardings(state)
    return before, *step(state, batches[0])


@functools.cache
def everything_cut(config, mesh_config):
    """The state after a step with everything sharded, and its metrics."""
    return one_step(config, mesh_config, ExecutionConfig(zero=3))[1:]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_levels_of_zero_change_where_things_lie_and_no_number(zero):
    # An epsilon of Adam that does not blow up rounding: the first step's update is else a sign.
    mesh, config = MeshConfig(data=2, fsdp=2, tensor=2), micro.run_config("pretrain")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eps=1.0))
    kept, state, metrics = one_step(config, mesh, ExecutionConfig(zero=zero))
    expected, expected_metrics = everything_cut(config, mesh)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=1e-5)
    assert_close(jax.device_get(expected.trained), jax.device_get(state.trained))
    gate = lambda tree: tree["llm"]["stack"]["layers"]["gate"]["kernel"]
    cut = lambda leaf: "fsdp" in leaf.sharding.spec
    assert not cut(gate(state.trained)) and cut(gate(expected.trained))
    assert cut(gate(optax.tree_utils.tree_get(state.opt_state, "mu"))) == (zero >= 1)
    # A step leaves everything where the next one expects it.
    assert micro.shardings(state) == kept


@pytest.mark.slow
def test_kernels_of_a_frozen_component_are_kept_in_the_compute_type_and_change_nothing():
    config = micro.run_config("align", execution=ExecutionConfig(dtype="bfloat16"))
    state, batches, step = micro.start(config)
    for path, leaf in flatten_dict(state.frozen).items():
        narrow = path[0] == "llm" and path[-1] == "kernel"
        assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), path
    wide = jax.tree.map(jnp.copy, state.replace(frozen=state.frozen | {"llm": micro.params(config)["llm"]}))
    (narrow, metrics), (full, full_metrics) = step(state, batches[0]), step(wide, batches[0])
    assert float(metrics["loss"]) == float(full_metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(narrow.trained), jax.device_get(full.trained))


@pytest.mark.slow
def test_a_frozen_component_is_handed_on_as_it_came(tmp_path, micro_corpus):
    say = lambda line: None
    first = micro.run_config("pretrain")
    save_result(tmp_path / "pretrain", STAGES["pretrain"], micro.params(first), first)
    micro.tokenizer().save(tmp_path / "pretrain")
    config = micro.run_config("align", steps=1, execution=ExecutionConfig(dtype="bfloat16"))
    loop.run(config, tmp_path / "align", {"llm": tmp_path / "pretrain"}, say=say)
    abstract = micro.run(config).abstract_params()["llm"]
    came, handed = (checkpoints.load_component(tmp_path / name, "llm", abstract) for name in ("pretrain", "align"))
    jax.tree.map(np.testing.assert_array_equal, came, handed)
    text = (tmp_path / "align" / table.FILE_NAME).read_text()
    assert "llm/head/kernel" in text and "frozen" in text and "batch/tokens" in text


def test_the_table_says_what_lies_where_and_what_cannot():
    config, mesh = micro.run_config("instruct", special=9), make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    run, trains = micro.run(config, mesh), lambda path: STAGES["instruct"].trains(path, config.model_config)
    lines, warnings = table.describe(run.layout, micro.dataset(config)[0], trains)
    row = next(line.split() for line in lines if line.startswith("llm/stack/layers/down/kernel"))
    assert row[1] == "2x64x32" and row[-1] == "2x16x16" and "tensor" in " ".join(row[2:])
    assert warnings == [
        "embedding/text_embedding/embedding: axis vocab of 311 is not divisible by tensor=4 and stays whole; "
        "vocab_multiple=4 in model.llm and model.embedding pads it"
    ]
    assert any(line.startswith("rules of gradients: batch -> data+fsdp") for line in lines)


def test_caches_are_sharded_by_the_same_table():
    config, mesh = micro.run_config("instruct"), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    cache = jax.eval_shape(lambda: micro.models(config).hovle.empty_cache(8, 16, 16))
    shardings = Placement(mesh).cache_shardings(cache)
    assert isinstance(shardings, HoVLECache)
    assert shardings.llm.key.shard_shape(cache.llm.key.shape) == (2, 2, 16, 1, 8)
    assert shardings.llm.length.shard_shape((8,)) == (2,)


def test_as_many_microbatches_as_leave_each_device_one_row():
    change = lambda stage, parts: micro.run_config(
        stage, data={"batch_size": 32}, execution=ExecutionConfig(accumulate=parts)
    )
    placement = Placement(make_mesh(FSDP))
    assert [accumulation(change("instruct", parts), placement) for parts in (-1, 1, 2)] == [4, 1, 2]
    assert accumulation(change("contrast", -1), placement) == 4
    with pytest.raises(UserError, match="execution.zero=4 is a level of ZeRO"):
        check_execution(ExecutionConfig(zero=4))
