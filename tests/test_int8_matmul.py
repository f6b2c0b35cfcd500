"""Decoder layers that multiply in int8 in the forward pass."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.config import ExecutionConfig, MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.model.execution import Execution, local_matmul
from hovle_jax.model.transformer import Stack
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training import checks
from tests import micro

pytest.importorskip("qwix", reason="qwix is not installed (the extra 'quantize')")

from hovle_jax.model.int8 import int8_matmul  # noqa: E402


def test_rows_and_columns_are_rounded_by_their_largest_value():
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=size).astype(np.float32) for size in ((2, 8, 64), (64, 32)))
    x[1, 3] *= 1000  # a row of large values takes nothing from the others
    of_rows, of_columns = (np.abs(a).max(axis=-1, keepdims=True) / 127.5 for a in (x.reshape(16, 64), kernel.T))
    wanted = (np.round(x.reshape(16, 64) / of_rows) * of_rows) @ (np.round(kernel.T / of_columns) * of_columns).T
    # The largest value lies between two steps, and may go to either.
    step = of_rows * np.abs(kernel).max() + of_columns.T * np.abs(x.reshape(16, 64)).max(axis=1, keepdims=True)
    assert (np.abs(int8_matmul(x, kernel).reshape(16, 32) - wanted) < 1.01 * step).all()
    exact = x.reshape(16, 64) @ kernel
    assert 0.003 < np.linalg.norm(wanted - exact) / np.linalg.norm(exact) < 0.02
    zeros = int8_matmul(jnp.zeros((4, 64)), kernel)
    assert not np.any(zeros)


def test_gradients_are_those_of_the_plain_matmul():
    rng = np.random.default_rng(1)
    x, kernel, weight = (rng.normal(size=size).astype(np.float32) for size in ((2, 8, 16), (16, 32), (2, 8, 32)))
    of = lambda multiply: jax.grad(lambda *both: jnp.sum(multiply(*both) * weight), argnums=(0, 1))(x, kernel)
    for found, wanted in zip(of(int8_matmul), of(local_matmul)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def multiplied(text):
    return len(re.findall(r"stablehlo.dot_general .*xi8>.*xi32>", text))


def test_layers_multiply_in_int8_in_the_forward_pass_alone():
    config = micro.model_config().llm.stack
    rows = jnp.broadcast_to(jnp.arange(8), (1, 8))
    x, segments = jnp.ones((1, 8, config.width)), jnp.ones((1, 8), jnp.int32)
    made = {int8: Stack(config, Execution(int8=int8)) for int8 in (False, True)}
    params = jax.eval_shape(made[False].init, jax.random.key(0), x, rows, segments)
    loss = lambda int8: lambda params: jnp.sum(made[int8].apply(params, x, rows, segments)[0])
    texts = {int8: jax.jit(jax.grad(loss(int8))).lower(params).as_text() for int8 in made}
    kernels = ("query", "key", "value", "output", "gate", "up", "down")
    assert multiplied(texts[True]) == len(kernels) and multiplied(texts[False]) == 0


def losses_of(int8, mesh=None, steps=8):
    config = micro.run_config("instruct", execution=ExecutionConfig(int8=int8), steps=steps)
    state, rows, step = micro.start(config, mesh)
    made = []
    for batch, _ in zip(rows, range(steps)):
        state, metrics = step(state, batch)
        made.append(float(metrics["loss"]))
    return np.asarray(made)


def test_a_run_learns_as_much_on_one_device_and_on_a_mesh():
    exact, int8 = losses_of(False), losses_of(True)
    assert 0 < abs(int8[0] / exact[0] - 1) < 0.005
    assert exact[0] - exact[-2:].mean() > 2 and abs(int8[-2:].mean() / exact[-2:].mean() - 1) < 0.03
    sharded = losses_of(True, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), steps=2)
    np.testing.assert_allclose(sharded, int8[:2], rtol=5e-3)  # rows of a shard have scales of their own


def test_without_qwix_a_run_says_what_to_install(monkeypatch):
    config = micro.run_config("instruct", execution=ExecutionConfig(int8=True))
    checks.check(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"execution.int8 .*pip install 'hovle_jax\[quantize\]'"):
        checks.check(config)
