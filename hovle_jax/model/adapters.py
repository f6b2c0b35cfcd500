"""Low-rank adapters: what is trained in the place of kernels that stay as they are.

A kernel W [D, F] gives x W + s (x A) B, with A [D, r], B [r, F] and s = alpha / r (LoRA, Hu et al. 2021), or
alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al. 2024) learns the lengths m of the columns apart:
x (W + s A B) m / |W + s A B|, where the lengths below the line have no gradient (section 4.3).

Adapters are a component of their own, {'llm/stack/layers/query': {'a', 'b'}, ...}; `attached` puts each beside its
kernel, where the layer finds it. So nothing else knows of them.

Dimension letters: D inputs, F outputs, r rank, N layers.
"""

import dataclasses
import fnmatch
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from hovle_jax.errors import UserError

COMPONENT = "adapter"
A, B, MAGNITUDE = "adapter_a", "adapter_b", "adapter_magnitude"  # beside a kernel
KERNEL = "kernel"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters in the place of a stage's parameters.

    Attributes:
      rank: r; 0 = no adapters: the parameters themselves are trained.
      alpha: what an adapter adds is multiplied by alpha / rank.
      targets: the kernels that have one, patterns with commas: 'llm/stack/*', 'llm/*/query,llm/*/value', 'embedding/*'.
      rank_stabilized: alpha / sqrt(rank) instead (rsLoRA).
      weight_decomposed: the lengths of a kernel's columns are learned apart (DoRA).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "llm/stack/*"
    rank_stabilized: bool = False
    weight_decomposed: bool = False

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def matches(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at a path gets an adapter."""
        name = "/".join(path[:-1])
        return path[-1] == KERNEL and any(fnmatch.fnmatchcase(name, p.strip()) for p in self.targets.split(","))

    def check(self) -> None:
        """Raises UserError for a rank that is none."""
        if self.rank < 0:
            raise UserError(f"adapter.rank={self.rank} must be 1 or more, or 0 for no adapters")


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel that gets an adapter: its path without 'kernel', its shape [..., D, F] and its logical axes."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def name(self) -> str:
        """Of its adapter in the component."""
        return "/".join(self.path)


class LowRank(nn.Module):
    """The parameters of one adapter."""

    target: Target
    config: AdapterConfig

    @nn.compact
    def __call__(self):
        *stack, D, F = self.target.shape
        *over, rows, columns = self.target.axes
        c = self.config
        # As PEFT's: uniform between plus and minus 1 / sqrt(D); adapters begin by adding nothing.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack))))
        self.param("a", nn.with_logical_partitioning(uniform, (*over, rows, None)), (*stack, D, c.rank))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (*over, None, columns))
        self.param("b", zeros, (*stack, c.rank, F))
        if c.weight_decomposed:  # the kernel's own, once that is known: see `begun`
            ones = nn.with_logical_partitioning(nn.initializers.ones, (*over, columns))
            self.param("magnitude", ones, (*stack, F))


class Adapters(nn.Module):
    """The component: an adapter for each target."""

    targets: tuple[Target, ...]
    config: AdapterConfig

    @nn.compact
    def __call__(self):
        for target in self.targets:
            LowRank(target, self.config, name=target.name)()


def attached(params: dict, config: AdapterConfig) -> dict:
    """Parameters {component: tree} without the component of adapters, which lie beside their kernels; B is scaled."""
    if COMPONENT not in params:
        return params
    flat = dict(traverse_util.flatten_dict({c: tree for c, tree in params.items() if c != COMPONENT}))
    for name, leaves in params[COMPONENT].items():
        path = tuple(name.split("/"))
        flat[*path, A], flat[*path, B] = leaves["a"], leaves["b"] * config.scale
        if "magnitude" in leaves:
            flat[*path, MAGNITUDE] = leaves["magnitude"]
    return traverse_util.unflatten_dict(flat)


def column_lengths(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """|W + A B| of each column, [..., F] float32; B is scaled."""
    wide = (array.astype(jnp.float32) for array in (kernel, a, b))
    kernel, a, b = wide
    return jnp.linalg.norm(kernel + a @ b, axis=-2)


def begun(adapters: dict, params: dict) -> dict:
    """Fresh adapters of kernels that are known: with DoRA they begin with the lengths of their columns."""
    made = {}
    for name, leaves in adapters.items():
        if "magnitude" in leaves:
            kernel = kernel_of(params, name)
            lengths = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
            leaves = leaves | {"magnitude": jax.device_put(lengths, leaves["magnitude"].sharding)}
        made[name] = leaves
    return made


def merged(params: dict, adapters: dict, config: AdapterConfig) -> dict:
    """Parameters whose kernels have taken their adapters in: W + s A B, or (W + s A B) m / |W + s A B|."""
    flat = dict(traverse_util.flatten_dict(params))
    for name, leaves in adapters.items():
        path = (*name.split("/"), KERNEL)
        if path in flat:
            flat[path] = merged_kernel(flat[path], leaves, config)
    return traverse_util.unflatten_dict(flat)


def merged_kernel(kernel: Any, leaves: dict, config: AdapterConfig) -> jax.Array:
    """A kernel [..., D, F] with its adapter, in the kernel's type."""
    wide = kernel.astype(jnp.float32) + config.scale * (leaves["a"] @ leaves["b"])
    if "magnitude" in leaves:
        lengths = jnp.linalg.norm(wide, axis=-2, keepdims=True)
        wide = wide * (leaves["magnitude"][..., None, :] / lengths)
    return wide.astype(kernel.dtype)


def kernel_of(params: dict, name: str) -> Any:
    """The kernel [..., D, F] beside which the adapter of this name lies."""
    for key in (*name.split("/"), KERNEL):
        params = params[key]
    return params
