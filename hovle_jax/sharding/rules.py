"""THE table: which mesh axes shard which logical axis.

Everything that lies on devices derives from it: parameters, gradients, moments, activations, batches, caches. The mesh
axes are `data, fsdp, tensor, sequence`, the outermost first; over several slices of TPUs `data` goes over them, so that
gradients alone travel through the data-centre network.
"""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

AXES = DATA, FSDP, TENSOR, SEQUENCE = ("data", "fsdp", "tensor", "sequence")

Rule = str | tuple[str, ...] | None

ACTIVATIONS: dict[str, Rule] = {
    "batch": (DATA, FSDP),  # rows
    "length": SEQUENCE,  # tokens of a row
    "embed_act": None,
}

PARAMETERS: dict[str, Rule] = {
    # fsdp shards the axis that every layer's kernel has, tensor the parallel one.
    "embed": FSDP,
    "embed_out": None,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
    # Small, or scanned over: whole everywhere.
    "embed_vector": None,
    "patch": None,
    "positions": None,
    "special_tokens": None,
    "layers": None,
}

# What fsdp shards, and from which level of ZeRO on (Rajbhandari et al. 2020, section 5).
ZERO = {"moments": 1, "gradients": 2, "parameters": 3}


def rules(zero: int = 3, use: str = "parameters") -> dict[str, Rule]:
    """The table for parameters, or for what belongs to them.

    Args:
      zero: what fsdp shards: 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 parameters too.
      use: of `ZERO`.
    Returns:
      {logical axis: mesh axis, tuple of them, or None}.
    """
    sharded = zero >= ZERO[use]
    return ACTIVATIONS | {name: None if axes == FSDP and not sharded else axes for name, axes in PARAMETERS.items()}


def as_axes(rule: Rule) -> tuple[str, ...]:
    """A rule's mesh axes as a tuple."""
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int], table: Mapping[str, Rule]
) -> tuple[PartitionSpec, list[tuple]]:
    """The mesh axes of an array whose dimensions have logical names.

    Args:
      names: a logical axis or None for each dimension.
      mesh_shape: {mesh axis: size}.
      table: see `rules`.
    Returns:
      (PartitionSpec, [(name, size, mesh axes, shards) of rules that cannot apply: the shards do not divide the size]).
    """
    spec, refused, used = [], [], set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(
            a for a in as_axes(table.get(name) if name else None) if mesh_shape.get(a, 1) > 1 and a not in used
        )
        shards = math.prod(mesh_shape[a] for a in axes)
        if size % shards:
            refused.append((name, size, axes, shards))
            axes = ()
        used.update(axes)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    while spec and spec[-1] is None:  # the compiler's own spelling: a step's outputs then fit the next one's inputs
        spec.pop()
    return PartitionSpec(*spec), refused


def padded(spec: PartitionSpec, ndim: int) -> tuple[Rule, ...]:
    """A spec as a tuple of one entry for each dimension."""
    return tuple(spec) + (None,) * (ndim - len(spec))
