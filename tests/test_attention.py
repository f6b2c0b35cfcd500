"""Splash attention, run by the Pallas interpreter, against the plain path."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.model import splash
from hovle_jax.model.attention import (
    AttentionMask,
    attend,
    choose,
    prepare,
)
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution, OneDevice
from hovle_jax.model.transformer import Stack
from hovle_jax.sharding.matmul import reduce_gradient
from hovle_jax.sharding.mesh import make_mesh, torus
from hovle_jax.sharding.placement import Placement

B, H, K, C = 2, 4, 2, 128


def inputs(length):
    rng = np.random.default_rng(length)
    make = lambda heads: jnp.asarray(rng.normal(size=(B, length, heads, C)), jnp.float32)
    segments = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
    segments[1, -length // 4 :] = 0  # padding
    return make(H), make(K), make(K), jnp.asarray(segments)


def run(implementation, query, key, value, segments, placement=OneDevice()):
    """(output where it is read, gradients)."""

    def loss(query, key, value):
        mask = prepare(AttentionMask.for_rows(segments), implementation, C)
        out = attend(query, key, value, mask, implementation, placement) * (segments > 0)[:, :, None, None]
        return jnp.sum(out * jnp.cos(jnp.arange(C))), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return out, grads


@pytest.fixture
def interpreted(monkeypatch):
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)
    monkeypatch.setattr(splash.pl, "pallas_call", functools.partial(splash.pl.pallas_call, interpret=True))
    monkeypatch.setattr(splash, "MOST_BLOCK", 128)


@pytest.mark.parametrize(
    "length, mesh",
    [(256, None), (200, None), (500, None), (256, MeshConfig(data=2, tensor=2, sequence=2))],
    ids=["whole", "padded", "long", "sharded"],
)
def test_splash_is_the_plain_attention(length, mesh, interpreted):
    wanted = run("xla", *inputs(length))
    placement = Placement(make_mesh(mesh)) if mesh else OneDevice()
    found = run("splash", *inputs(length), placement)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


def test_rows_whose_gradients_do_not_fit_go_in_parts(interpreted, monkeypatch):
    wanted = run("splash", *inputs(500))
    monkeypatch.setattr(splash, "_SUMS_BYTES", 128 * (H // K) * C * 4)  # of one block
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run("splash", *inputs(500)), wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [0, 256], ids=["whole", "shard of a row"])
def test_the_backward_kernel_as_tpus_run_it(first, causal, monkeypatch):
    """With copies to and from vector memory, and NaN in what was not written; segments in no order."""
    monkeypatch.setattr(splash, "MOST_BLOCK", 128)
    monkeypatch.setattr(
        splash.pl, "pallas_call", functools.partial(splash.pl.pallas_call, interpret=pltpu.InterpretParams())
    )
    query, key, value, _ = (x[0].swapaxes(0, 1)[None] if x.ndim == 4 else x for x in inputs(384))
    query, segments = (
        query[:, :, first:] * C**-0.5,
        jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 384)), jnp.int32),
    )
    places = jnp.arange(384, dtype=jnp.int32)
    d_out = jnp.cos(query)

    def plain(query, key, value):
        scores = jnp.einsum("bhlc,bhsc->bhls", query, jnp.repeat(key, H // K, axis=1))
        seen = segments[:, first:, None] == segments[:, None]
        seen &= (places[None, :] <= places[first:, None]) | (not causal)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        out = jnp.einsum("bhls,bhsc->bhlc", jax.nn.softmax(scores), jnp.repeat(value, H // K, axis=1))
        return out, jax.nn.logsumexp(scores, axis=-1)

    (out, log_sum), vjp = jax.vjp(plain, query, key, value)
    wanted = vjp((d_out, jnp.zeros_like(log_sum)))
    mean = jnp.sum(out * d_out, axis=-1)
    queries, keys = splash.Tokens(segments[:, first:], places[first:]), splash.Tokens(segments, places)
    found = splash.gradients(
        (query, d_out, log_sum, mean, queries.codes(causal, 384)),
        *(key, value, keys.codes(causal, 384)),
        splash.computed_blocks(query.shape[2], 384, first, causal),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), tuple(found), wanted)


def test_a_query_sees_its_segment_up_to_itself():
    """By codes alone, for every pair; segments that differ by as much as may be."""
    length = 1000
    segments = np.asarray([0, 1, 2, 2**31 // splash.reach(length) - 1, 5, 5, 0])[np.arange(length) % 7]
    rows = splash.Tokens(jnp.asarray(segments, jnp.int32), jnp.arange(length, dtype=jnp.int32))
    for causal in (True, False):
        codes = rows.codes(causal, length)
        seen = splash._seen(codes[None], codes[:, None], (length, length), splash.reach(length)).T
        place = np.arange(length)
        wanted = (segments[:, None] == segments) & ((place <= place[:, None]) | (not causal))
        np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stack_pads_its_rows_once(shards, interpreted):
    config = StackConfig(num_layers=2, width=256, num_heads=2, num_kv_heads=1, head_dim=128, mlp_width=256)
    placement = Placement(make_mesh(MeshConfig(data=2, sequence=shards, fsdp=4 // shards)))
    x, _, _, segments = inputs(200)
    x, positions = x.reshape(B, 200, -1)[..., :256], jnp.broadcast_to(jnp.arange(200), (B, 200))
    read = (segments > 0)[:, :, None]

    def outputs(implementation, placement, **more):
        stack = Stack(config, Execution(attention=implementation, placement=placement, **more))
        params = Stack(config, Execution()).init(jax.random.key(0), x, positions, segments)
        loss = lambda params, x: jnp.sum(jnp.sin(stack.apply(params, x, positions, segments)[0]) * read)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(nn.unbox(params), x)

    wanted, found = outputs("xla", OneDevice()), outputs("splash", placement, remat="query,key,value,attention,gate,up")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, wanted)


@pytest.mark.parametrize("remat, forward", [("full", 2), ("query,key,value,attention,gate,up", 1)])
def test_the_forward_kernel_runs_once_where_what_it_leaves_is_kept(remat, forward):
    config = StackConfig(num_layers=1, width=128, num_heads=1, num_kv_heads=1, head_dim=128, mlp_width=128)
    stack, rows = Stack(config, Execution(attention="splash", remat=remat)), jnp.zeros((1, 128), jnp.int32)
    x = jnp.zeros((1, 128, 128))
    params = jax.eval_shape(Stack(config, Execution()).init, jax.random.key(0), x, rows, rows)
    loss = lambda params, x: jnp.sum(stack.apply(params, x, rows, rows)[0])
    text = str(jax.make_jaxpr(jax.grad(loss))(nn.unbox(params), x))
    assert len(re.findall(r"name=splash_mha\w*fwd", text)) == forward and text.count("name=splash_gradients") == 1


def test_what_splash_cannot_do_falls_back_with_the_reason():
    assert choose("splash", 128) == ("splash", "")
    assert choose("splash", 64)[0] == "xla" and "64" in choose("splash", 64)[1]
    assert choose("splash", 128, whole=False)[0] == "xla"  # with a cache


def test_blocks_divide_the_row():
    assert splash.block_of(4096) == 1024 and splash.block_of(14_080) == 640 and splash.block_of(128) == 128


def test_rows_are_padded_to_blocks_that_are_large():
    """HD's long stream of 14,080 in 14 blocks of 1,024, each of which has gradients to be summed, not in 22."""
    assert splash.padded_length(14_080) == 14_336 and splash.block_of(14_336) == 1024
    assert [splash.padded_length(length) for length in (100, 600, 4096, 8192)] == [128, 640, 4096, 8192]
    assert splash.padded_length(1025) == 1152 and splash.padded_length(4224) == 4480  # and not to 2,048 and 5,120
    for length in range(1, 9000, 97):
        for shards in (1, 2, 4):
            padded = splash.padded_length(length, shards)
            assert (
                length <= padded <= -(-length // (128 * shards)) * 128 * shards * 1.5 and padded % (128 * shards) == 0
            )


class Chip:
    def __init__(self, *coords):
        self.coords = coords


@pytest.mark.parametrize(
    "coords, phases",
    [
        ([(x, y, 0) for y in range(2) for x in range(4)], (2, 4)),
        ([(x, y, 0) for x in range(4) for y in range(2)], (4, 2)),
        ([(x, 0, 0) for x in range(8)], (8,)),
        ([(0, 0), (1, 1), (0, 1), (1, 0)], (4,)),  # in no order
    ],
)
def test_reduce_scatters_follow_the_torus(coords, phases):
    class Mesh:
        devices = np.array([Chip(*c) for c in coords], object).reshape(1, -1, 1, 1)

    assert torus(Mesh) == phases


def test_phases_leave_the_shards_where_one_reduce_scatter_would():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    x = jnp.arange(8 * 16 * 3, dtype=jnp.float32).reshape(8 * 16, 3)

    def scatter(phases):
        local = functools.partial(reduce_gradient, rows=("fsdp",), dimension=0, phases=phases)
        spec = PartitionSpec("fsdp")
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x)

    for phases in ((2, 4), (4, 2), (2, 2, 2)):
        np.testing.assert_array_equal(scatter(phases), scatter((8,)))
