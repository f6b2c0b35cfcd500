"""Splash attention, run by the Pallas interpreter, against the plain path."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import PartitionSpec

from hovle_jax.config import MeshConfig
from hovle_jax.model import attention
from hovle_jax.model.attention import (
    AttentionMask,
    attend,
    choose,
    prepare,
    splash_block,
    splash_is_fused,
    splash_length,
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
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 128)


@pytest.mark.parametrize(
    "length, mesh",
    [(256, None), (200, None), (500, None), (256, MeshConfig(data=2, tensor=2, sequence=2))],
    ids=["fused", "padded", "not fused", "sharded"],
)
def test_splash_is_the_plain_attention(length, mesh, interpreted):
    wanted = run("xla", *inputs(length))
    assert splash_is_fused(splash_length(length)) is (length < 500)
    placement = Placement(make_mesh(mesh)) if mesh else OneDevice()
    found = run("splash", *inputs(length), placement)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


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


def test_what_splash_cannot_do_falls_back_with_the_reason():
    assert choose("splash", 128) == ("splash", "")
    assert choose("splash", 64)[0] == "xla" and "64" in choose("splash", 64)[1]
    assert choose("splash", 128, whole=False)[0] == "xla"  # with a cache


def test_blocks_divide_the_row():
    assert splash_block(4096) == 1024 and splash_block(14_080) == 640 and splash_block(128) == 128


def test_rows_are_padded_to_blocks_that_are_large():
    """HD's long stream of 14,080 in 14 blocks of 1,024, each of which has gradients to be summed, not in 22."""
    assert splash_length(14_080) == 14_336 and splash_block(14_336) == 1024
    assert [splash_length(length) for length in (100, 600, 4096, 8192)] == [128, 640, 4096, 8192]
    assert splash_length(1025) == 1152 and splash_length(4224) == 4480  # and not to 2,048 and 5,120
    for length in range(1, 9000, 97):
        for shards in (1, 2, 4):
            padded = splash_length(length, shards)
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
