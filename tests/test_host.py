"""The host's memory: what is freed stays, where that is wanted and possible."""

import os
import subprocess
import sys

import pytest

from hovle_jax.system import malloc

# Page faults of ten calls with temporaries of 64 MB (16,384 pages), after two calls; the heap may grow once more.
CHILD = """
import resource, sys
from hovle_jax.system import malloc
if sys.argv[1] == "keep" and not malloc.keep_freed_memory():
    sys.exit(3)
import jax, jax.numpy as jnp
f = jax.jit(lambda x: ((x @ x.T) @ x).sum())
x = jnp.ones((4096, 16))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(12):
    if step == 2:
        before = faults()
    f(x).block_until_ready()
print(faults() - before)
"""


def faults(mode):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    child = subprocess.run([sys.executable, "-c", CHILD, mode], env=env, capture_output=True, text=True, check=False)
    if child.returncode == 3:
        pytest.skip("the C library is not glibc")
    return int(child.stdout)


@pytest.mark.slow
def test_a_step_finds_its_memory_again():
    assert faults("keep") < faults("free") / 3


@pytest.mark.parametrize("platforms,expected", [("cpu", True), ("tpu", False), ("tpu,cpu", False), ("cpu,tpu", True)])
def test_only_where_the_host_computes(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert malloc.computes() == expected


def test_an_accelerator_hosts_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert not malloc.keep_freed_memory()
