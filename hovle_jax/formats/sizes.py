"""Checks a config's sizes against the checkpoint's tensors, before anything of these sizes is built.

One number in a config.json can ask for the names of a billion layers, or for a table that fits no memory. The tensors'
headers say what there is: a config that asks for more is wrong, and fails at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.model.clip_config import ResNetConfig

DIMENSIONS = (
    "width", "mlp_width", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "patch_size", "context",
    "projection_width",
)  # fmt: skip
MAX_POSITIONS = 2**31 - 1  # of int32
MAX_GRID = 1024  # patches along a side of a tile whose learned positions are resized


def check_sizes(config: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError, with the numbers, where a config asks for more than the tensors can hold.

    Args:
      config: a dataclass of model/config.py, or one of several such.
      shapes: {tensor name: shape} of the whole checkpoint.
    """
    most = max((size for shape in shapes.values() for size in shape), default=0)
    for path, piece in _nested(config):
        at = f"{where}: {path}" if path else where
        for name in DIMENSIONS:
            if name == "patch_size" and isinstance(piece, ResNetConfig):
                continue  # fixed, and no tensor's
            _check(at, name, getattr(piece, name, 0), most, f"no dimension of any tensor exceeds {most:,}")
        layers = getattr(piece, "num_layers", 0)
        _check(at, "num_layers", layers, len(shapes), f"the checkpoint has {len(shapes):,} tensors in all")
        _check(at, "max_length", getattr(piece, "max_length", 0), MAX_POSITIONS, "positions are 32-bit integers")
        if hasattr(piece, "image_size"):
            _check_tiles(at, piece, most)


def _check_tiles(at, config, most):
    side = (math.isqrt(most) + 1) * config.patch_size - 1  # pixels may be left that make no patch
    reason = f"a patch is {config.patch_size} pixels wide and no tensor has more than {most:,} rows of positions"
    _check(at, "image_size", config.image_size, side, reason)
    limit = MAX_GRID * config.patch_size
    _check(
        at,
        "force_image_size",
        getattr(config, "force_image_size", 0),
        limit,
        f"a tile has at most {limit:,} pixels a side",
    )


def _check(at, name, value, limit, reason):
    if value > limit:
        raise UserError(f"{at}: {name}={value:,} is not possible: {reason}")


def _nested(config, path=""):
    """(path, dataclass) of a config and of all dataclasses inside it."""
    yield path, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _nested(value, f"{path}.{field.name}".lstrip("."))
