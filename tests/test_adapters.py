"""Low-rank adapters: beside their kernels and merged into them, what is trained, what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hovle_jax import checkpoints
from hovle_jax.components import adapter_targets
from hovle_jax.errors import UserError
from hovle_jax.model import adapters
from hovle_jax.model.adapters import AdapterConfig
from hovle_jax.training.stages import STAGES
from hovle_jax.training.step import total_loss
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")
KINDS = {
    "lora": AdapterConfig(rank=4, alpha=8.0),
    "rslora": AdapterConfig(rank=4, alpha=8.0, rank_stabilized=True),
    "dora": AdapterConfig(rank=3, alpha=6.0, weight_decomposed=True),
}


def config(adapter, stage="instruct", **changes):
    return micro.run_config(stage, adapter=adapter, **changes)


def drawn(adapter):
    """Adapters that have learned something."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.1, leaf.dtype), adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind):
    run = config(dataclasses.replace(KINDS[kind], targets="llm/stack/*,embedding/stack/*/query,llm/head"))
    params, batch = micro.params(run), micro.dataset(run)[0]
    params["adapter"] = drawn(adapters.begun(params["adapter"], params))
    assert len(params["adapter"]) == 7 + 1 + 1
    loss = lambda adapter: total_loss({"adapter": adapter}, base, batch, "instruct", micro.models(run))[0]
    base = {name: tree for name, tree in params.items() if name != "adapter"}
    value, grads = jax.value_and_grad(loss)(params["adapter"])
    merged = adapters.merged(base, params["adapter"], run.adapter)
    plain = micro.run_config("instruct")
    alone = lambda params: total_loss(params, {}, batch, "instruct", micro.models(plain))[0]
    assert value == pytest.approx(float(alone(merged)), abs=1e-5) and abs(value - alone(base)) > 1e-3
    if kind == "dora":  # whose lengths have no gradient
        return
    full = jax.grad(alone)(merged)
    for name, leaves in params["adapter"].items():
        kernel = adapters.kernel_of(full, name)
        scale = run.adapter.scale
        expected = scale * kernel @ leaves["b"].swapaxes(-1, -2), scale * leaves["a"].swapaxes(-1, -2) @ kernel
        for leaf, value in zip("ab", expected):
            np.testing.assert_allclose(grads[name][leaf], value, atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing(kind):
    run = config(KINDS[kind])
    state, dataset, _ = micro.start(run, drawn=started(run))
    plain = micro.run_config("instruct")
    batch = dataset[0]
    with_them = total_loss(state.trained, state.frozen, batch, "instruct", micro.models(run))[0]
    base = {name: tree for name, tree in started(run).items() if name != "adapter"}
    assert with_them == pytest.approx(float(total_loss(base, {}, batch, "instruct", micro.models(plain))[0]), abs=1e-5)


def started(run):
    """Parameters as a run begins with them."""
    params = micro.params(run)
    for leaves in params["adapter"].values():
        leaves["b"] = jnp.zeros_like(leaves["b"])
    params["adapter"] = adapters.begun(params["adapter"], params)
    return params


def test_adapters_alone_are_trained_and_have_moments():
    run = config(KINDS["lora"])
    state, dataset, step = micro.start(run, drawn=started(run))
    assert list(state.trained) == ["adapter"] and set(state.frozen) == {"embedding", "llm"}
    moments = {path for path in map(jax.tree_util.keystr, paths(state.opt_state)) if "mu" in path}
    assert moments and all("adapter" in path for path in moments)
    before = jax.device_get(state.frozen)
    state, losses = micro.trained(state, dataset, step)
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.frozen))
    assert all(np.abs(leaves["b"]).max() > 0 for leaves in state.trained["adapter"].values())


def paths(tree):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("targets, names", [
    ("llm/*/query,llm/*/value", ["llm/stack/layers/query", "llm/stack/layers/value"]),
    ("embedding/stack/*/down", ["embedding/stack/layers/down"]),
    ("llm/head", ["llm/head"]),
])  # fmt: skip
def test_patterns_choose_kernels(targets, names):
    run = config(AdapterConfig(rank=2, targets=targets))
    assert [target.name for target in adapter_targets(run.model_config)] == names


@pytest.mark.parametrize("adapter, message", [
    (dict(rank=-1), "adapter.rank=-1 must be 1 or more"),
    (dict(rank=4, targets="llm/nothing"), "matches no kernel; use patterns as embedding/.*, llm/"),
    (dict(rank=4, targets="clip/*"), "matches clip/.*, which this stage does not hold"),
])  # fmt: skip
def test_mistakes(adapter, message):
    with pytest.raises(UserError, match=message):
        micro.run(config(AdapterConfig(**adapter)))


def test_every_stage_may_train_adapters():
    """Of what it trains."""
    for name, stage in STAGES.items():
        component = stage.trained[0][0]
        run = config(AdapterConfig(rank=2, targets=f"{component}/*"), stage=name)
        state, dataset, step = micro.start(run)
        state, metrics = step(state, dataset[0])
        assert np.isfinite(float(metrics["loss"])) and list(state.trained) == ["adapter"], name


def test_a_run_hands_on_the_merged_model(tmp_path):
    from hovle_jax.training.weights import save_result

    run = config(KINDS["dora"])
    params = micro.params(run)
    params["adapter"] = drawn(adapters.begun(params["adapter"], params))
    save_result(tmp_path, STAGES["instruct"], params, run)
    stored = checkpoints.load_model_config(tmp_path)
    assert not stored.adapter.rank
    abstract = {c: tree for c, tree in micro.run(run).abstract_params().items() if c != "adapter"}
    merged = adapters.merged(params, params["adapter"], run.adapter)
    for component, tree in abstract.items():
        read = checkpoints.load_component(tmp_path, component, tree)
        for path, leaf in traverse_util.flatten_dict(read).items():
            np.testing.assert_array_equal(leaf, traverse_util.flatten_dict(merged)[component, *path])
