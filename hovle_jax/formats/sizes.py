"""A config's sizes against the tensors beside it, before anything of these sizes is built.

One number in a config.json can ask for the names of a billion layers, or for a table that no memory holds. The tensors'
headers say what there is: a config that asks for more is wrong, and that is seen at once.
"""

import dataclasses
import math

from hovle_jax.errors import UserError

DIMENSIONS = ("width", "mlp_width", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "patch_size")
MAX_POSITIONS = 2**31 - 1  # of int32
MAX_GRID = 1024  # patches along a side of a tile whose learned positions are resized


def check_sizes(config, shapes, where):
    """Raises UserError, with the numbers, where a config asks for more than the tensors can hold.

    Args:
      config: a dataclass of model/config.py, or one that holds several.
      shapes: {tensor name: shape} of the whole checkpoint.
    """
    most = max((size for shape in shapes.values() for size in shape), default=0)
    for path, part in _parts(config):
        at = f"{where}: {path}" if path else where
        for name in DIMENSIONS:
            _check(at, name, getattr(part, name, 0), most, f"no dimension of any tensor exceeds {most:,}")
        layers = getattr(part, "num_layers", 0)
        _check(at, "num_layers", layers, len(shapes), f"the checkpoint has {len(shapes):,} tensors in all")
        _check(at, "max_length", getattr(part, "max_length", 0), MAX_POSITIONS, "positions are 32-bit integers")
        if hasattr(part, "image_size"):
            _check_tiles(at, part, most)


def _check_tiles(at, part, most):
    side = math.isqrt(most) * part.patch_size
    reason = f"a patch is {part.patch_size} pixels wide and no tensor has more than {most:,} rows of positions"
    _check(at, "image_size", part.image_size, side, reason)
    limit = MAX_GRID * part.patch_size
    _check(at, "force_image_size", getattr(part, "force_image_size", 0), limit, f"tiles end at {limit:,} pixels")


def _check(at, name, value, limit, reason):
    if value > limit:
        raise UserError(f"{at}: {name}={value:,} cannot be: {reason}")


def _parts(config, path=""):
    """(path, dataclass) of a config and of all that it is made of."""
    yield path, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{path}.{field.name}".lstrip("."))
