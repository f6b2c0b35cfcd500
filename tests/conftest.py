"""Tests run on the CPU with eight devices, so that meshes can be tested; set before JAX is imported anywhere."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


@pytest.fixture(scope="module")
def quick_compilation():
    """Half of the time to compile; the numbers are those of the same program."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
