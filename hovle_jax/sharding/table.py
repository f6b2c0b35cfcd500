"""What lies where on the mesh, as a table for people: every parameter, gradient, moment and field of the batch."""

from collections.abc import Callable

import numpy as np

from hovle_jax.sharding.layout import Layout, Path
from hovle_jax.sharding.rules import as_axes

FILE_NAME = "layout.txt"
HEADER = ("array", "shape", "parameter", "gradient", "moments", "a device's shard")


def describe(layout: Layout, batch: dict, trains: Callable[[Path], bool]) -> tuple[list[str], list[str]]:
    """-> (the lines of the table, warnings: rules that cannot apply, with numbers and a remedy).

    Args:
      batch: of the run, or its shapes.
      trains: whether a parameter is trained, by its path.
    """
    placement = layout.placement
    lines = [
        "mesh: " + " x ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
        + f"; zero={placement.zero}",
    ]  # fmt: skip
    for use in ("parameters", "gradients", "moments"):
        lines.append(f"rules of {use}: " + ", ".join(f"{n} -> {_axes(a)}" for n, a in placement.rules(use).items()))
    rows: list[tuple[str, ...]] = [HEADER]
    warnings = []
    for path, leaf in layout.leaves:
        name = "/".join(path)
        others = [_spec(leaf.spec(use)) if trains(path) else "frozen" for use in ("gradients", "moments")]
        shard = placement.sharding(leaf.spec()).shard_shape(leaf.shape)
        rows.append((name, _shape(leaf.shape), _spec(leaf.spec()), *others, _shape(shard)))
        warnings += [_warning(name, *rule) for rule in leaf.refused]
    sharding = placement.batch_sharding
    for name, leaf in batch.items():
        shard = sharding.shard_shape(np.shape(leaf))
        rows.append((f"batch/{name}", _shape(np.shape(leaf)), _spec(sharding.spec), "", "", _shape(shard)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return lines, warnings


def _warning(where, name, size, axes, shards):
    remedy = f"; vocab_multiple={shards} in model.llm and model.embedding pads it" * (name == "vocab")
    return f"{where}: axis {name} of {size} is not divisible by {' x '.join(axes)}={shards} and stays whole{remedy}"


def _shape(shape):
    return "x".join(map(str, shape)) or "1"


def _axes(rule):
    return "+".join(as_axes(rule)) or "whole"


def _spec(spec):
    return "(" + ", ".join(_axes(axes) if axes else "-" for axes in spec) + ")" if any(spec) else "whole"
