"""What lies where on the mesh, as a table for people: every parameter, gradient, moment and field of the batch."""

import jax
import numpy as np

from hovle_jax.model.parallel import GRADIENTS, MOMENTS
from hovle_jax.training.sharding import batch_sharding, is_boxed, rules, spec_of
from hovle_jax.training.stages import STAGES, Models
from hovle_jax.training.state import boxed_params, keys_of, unboxed

FILE_NAME = "layout.txt"


def describe(models: Models, batch, mesh):
    """-> (the lines of the table, warnings: rules that cannot apply, with numbers and a remedy).

    Args:
      batch: of the run, or its shapes.
    """
    zero, stage = models.execution.zero, STAGES[models.config.stage]
    lines = [
        "mesh: " + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items()) + f"; zero={zero}",
        "rules: " + ", ".join(f"{name} -> {_axes(axes)}" for name, axes in rules(zero).items()),
    ]
    warnings, rows = [], [("array", "shape", "parameter", "gradient", "moments", "a device's part")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed_params(models, batch), is_leaf=is_boxed):
        name, shape = "/".join(keys_of(path)), unboxed(leaf).shape
        trained = stage.trains(keys_of(path), models.config.model)
        (spec, refused), *others = (spec_of(leaf, mesh, zero, suffix) for suffix in ("", GRADIENTS, MOMENTS))
        others = [_spec(other) if trained else "frozen" for other, _ in others]
        part = jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)
        rows.append((name, _shape(shape), _spec(spec), *others, _shape(part)))
        warnings += [_warning(name, *rule) for rule in refused]
    for name, leaf in batch.items():
        sharding = batch_sharding(mesh)
        part = sharding.shard_shape(np.shape(leaf))
        rows.append((f"batch/{name}", _shape(np.shape(leaf)), _spec(sharding.spec), "", "", _shape(part)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return lines, warnings


def _warning(where, name, size, axes, parts):
    remedy = f"; vocab_multiple={parts} in model.llm and model.embedding pads it" * (name == "vocab")
    return f"{where}: axis {name} of {size} is not divisible by {' x '.join(axes)}={parts} and stays whole{remedy}"


def _shape(shape):
    return "x".join(map(str, shape)) or "1"


def _axes(axes):
    return "whole" if axes is None else axes if isinstance(axes, str) else "+".join(axes)


def _spec(spec):
    return "(" + ", ".join(_axes(axes) if axes else "-" for axes in spec) + ")" if any(spec) else "whole"
