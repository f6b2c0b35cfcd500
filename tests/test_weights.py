"""Weights as decoding reads them: fused, in int8, sharded."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.checkpoints import abstract_component
from hovle_jax.config import MeshConfig
from hovle_jax.inference import slots as programs
from hovle_jax.inference import weights
from hovle_jax.inference.caches import LayerSlots, One
from hovle_jax.inference.calibration import input_sizes
from hovle_jax.inference.engine import Engine, Request
from hovle_jax.inference.layer import LayerWeights
from hovle_jax.inference.weights import Int8Head, Int8Kernel, joined
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution
from hovle_jax.model.transformer import Stack
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from tests import micro
from tests.test_decode import make_answerer, prompts
from tests.test_engine import NEW, SETTINGS, answers

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, F, ROWS = 96, 64, 5


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def read_back(made):
    """The rounded kernel [F, D] in float32."""
    kernel = np.asarray(made.kernel, np.float32)
    whole = kernel[:, :D].copy()
    whole[:, np.asarray(made.columns)] += kernel[:, D:] / 254
    return whole * np.asarray(made.scale)[:, None]


def test_int8_inputs_cost_next_to_nothing():
    """The product is that of the rounded kernel with inputs of 15 bits, also where one input is far larger."""
    x, bias = drawn(ROWS, D).at[:, 3].multiply(50), drawn(F, seed=2)
    made = Int8Kernel.of(drawn(F, D, seed=1), bias, jnp.ones(D))
    assert made.kernel.dtype == jnp.int8 and int(jnp.max(jnp.abs(made.kernel[:, :D]), axis=1).min()) == 127
    exact = np.asarray(x) @ read_back(made).T + bias
    spread = float(jnp.max(jnp.abs(x))) * float(jnp.max(jnp.abs(made.scale))) * 127
    np.testing.assert_allclose(made(x), exact, atol=2e-3 * spread)
    np.testing.assert_allclose(made(x[None])[0], made(x), rtol=1e-6)


def test_the_columns_of_large_inputs_have_second_halves():
    kernel, count = drawn(F, D, seed=1), int(D * weights.SHARE)
    made = Int8Kernel.of(kernel, None, jnp.arange(D, dtype=jnp.float32))
    assert count and sorted(made.columns.tolist()) == list(range(D - count, D))
    error = np.abs(read_back(made) - kernel).max(axis=0)
    assert error[D - count :].max() < error[: D - count].min() / 50


def test_int8_kernels_are_near_those_in_float():
    kernel, x = drawn(F, D, seed=1), drawn(ROWS, D)
    dense = {"kernel": kernel.T}
    plain, rounded = (joined([dense], "float32", inputs)(x) for inputs in (None, jnp.ones(D)))
    error = float(jnp.linalg.norm(rounded - plain) / jnp.linalg.norm(plain))
    assert 1e-4 < error < 0.01


def test_the_largest_logits_of_an_int8_head_are_made_anew(monkeypatch):
    monkeypatch.setattr(weights, "LEADERS", 5)
    kernel, x = drawn(F, D, seed=1), drawn(ROWS, D)
    exact = np.asarray(x @ kernel.T)
    error = np.abs(Int8Head.of(kernel)(x) - exact)
    is_leader = exact >= np.sort(exact, axis=1)[:, [-5]]
    assert error[is_leader].max() < 2e-3 and error[~is_leader].max() > 5e-3


def test_an_output_of_zeros_alone_stays_zero():
    assert not np.asarray(Int8Kernel.of(jnp.zeros((F, D)), None, jnp.ones(D))(drawn(ROWS, D))).any()


@pytest.mark.parametrize("extras", [{}, dict(qkv_bias=True, output_bias=True, mlp_bias=True), dict(qk_norm=True)])
def test_a_fused_stack_gives_what_the_plain_one_gives(extras):
    config = StackConfig(2, 32, 4, 2, 8, 48, **extras)
    stack, x = Stack(config, Execution()), drawn(1, 12, 32)
    positions = jnp.arange(12)[None]
    segments = jnp.ones((1, 12), jnp.int32)
    abstract = jax.eval_shape(stack.init, jax.random.key(0), x, positions, segments)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2 + (leaf.ndim == 2), jnp.float32),
        nn.meta.unbox(abstract),
    )
    plain, _ = jax.jit(stack.apply)({"params": params}, x, positions, segments)
    layers = LayerWeights.of_stack(params["layers"], 2, "float32")
    caches = tuple(LayerSlots.empty(config, 1, 12, jnp.float32) for _ in range(2))
    fused, _ = programs._run(
        config, Execution(), layers, x, positions, caches, One(jnp.int32(0), jnp.int32(0), 12), jnp.int32(12)
    )
    np.testing.assert_allclose(fused, plain, atol=2e-5)


def test_an_engine_over_a_mesh_makes_the_tokens_of_one_device():
    alone = make_answerer()
    config, placement = micro.run_config("instruct").model_config, Placement(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    execution = dataclasses.replace(alone.hovle.execution, placement=placement)
    put = lambda leaf, like: jax.device_put(leaf, like.sharding)
    params = {c: jax.tree.map(put, alone.params[c], abstract_component(config, c, placement)) for c in alone.params}
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    over_mesh = dataclasses.replace(alone, hovle=dataclasses.replace(alone.hovle, execution=execution), params=params)
    engines = [Engine(answerer, **SETTINGS) for answerer in (alone, over_mesh)]
    one, many = ([s.tokens for s in answers(engine, prompts(), [Request(NEW)] * 3)] for engine in engines)
    assert one == many


def test_what_an_engine_consumes_is_gone_and_the_rest_is_not():
    answerer = make_answerer()
    params = jax.tree.map(jnp.copy, answerer.params)
    kept, taken = (programs.fused(params, answerer.hovle, consume=consume) for consume in (False, True))
    jax.tree.map(np.testing.assert_array_equal, kept, taken)
    stack = params["llm"]["stack"]["layers"]
    assert all(stack[name]["kernel"].is_deleted() for name in ("query", "key", "value", "output", "gate", "up", "down"))
    assert not params["llm"]["token_embedding"]["embedding"].is_deleted()


def test_int8_answers_are_those_of_the_rounded_weights():
    """Of random weights, whose logits are close together: the first token of each answer."""
    answerer = make_answerer("post")
    engine = Engine(answerer, **SETTINGS, params=programs.fused(answerer.params, answerer.hovle, int8=True))
    exact = answers(Engine(answerer, **SETTINGS), prompts(), [Request(1)] * 3)
    rounded = answers(engine, prompts(), [Request(1)] * 3)
    for a, b in zip(exact, rounded):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.05
    assert engine.params["head"].coarse.kernel.dtype == jnp.int8


@pytest.mark.parametrize("alone", [False, True])
def test_the_inputs_that_are_large_are_found(alone):
    """Weights before a product are changed so that it is known which of its inputs are."""
    answerer = make_answerer("post")
    if alone:
        config = dataclasses.replace(answerer.hovle.config, embedding=None)
        hovle, params = dataclasses.replace(answerer.hovle, config=config), {"llm": answerer.params["llm"]}
        answerer = dataclasses.replace(answerer, hovle=hovle, params=params)
    llm = answerer.params["llm"]["stack"]["layers"]
    change = lambda leaf, at, by: leaf.at[:, ..., at].multiply(by)
    llm["attention_norm"]["scale"] = change(llm["attention_norm"]["scale"], 5, 30)
    llm["ffn_norm"]["scale"] = change(llm["ffn_norm"]["scale"], 7, 30)
    llm["up"]["kernel"] = change(llm["up"]["kernel"], 11, 1000)
    head = answerer.hovle.config.llm.stack.head_dim
    llm["value"]["kernel"] = change(llm["value"]["kernel"], slice(0, head), 100)
    sizes = input_sizes(answerer.params, hovle=answerer.hovle)
    assert set(sizes) == set(answerer.params) & {"embedding", "llm"}
    largest = {name: np.argmax(rows, axis=1) for name, rows in sizes["llm"].items()}
    groups = answerer.hovle.config.llm.stack.num_heads // answerer.hovle.config.llm.stack.num_kv_heads
    assert (largest["qkv"] == 5).all() and (largest["gate_up"] == 7).all() and (largest["down"] == 11).all()
    assert (largest["output"] < head * groups).all()
