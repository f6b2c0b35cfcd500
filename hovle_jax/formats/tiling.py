"""The tiling of images in InternVL's public config.json."""

from typing import Any

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.formats.fields import count, field


def tiling_from_json(config: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """A public config -> the tiling fields of `ModelConfig`; a missing key has that field's default.

    Raises:
      UserError: a value of the wrong kind, or a minimum above the maximum.
    """
    default = ModelConfig()
    fewest = count(config, "min_dynamic_patch", default.min_tiles, where)
    most = count(config, "max_dynamic_patch", max(default.max_tiles, fewest), where)
    thumbnail, dynamic = (
        _flag(config, key, value, where)
        for key, value in (("use_thumbnail", default.thumbnail), ("dynamic_image_size", True))
    )
    if fewest > most:
        raise UserError(f"{where}: min_dynamic_patch={fewest} exceeds max_dynamic_patch={most}")
    if not dynamic:
        fewest = most = 1
    return {"min_tiles": fewest, "max_tiles": most, "thumbnail": thumbnail}


def _flag(config, key, default, where):
    value = field(config, key, default, where)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key}={value!r} must be true or false")
    return value


def tiling_to_json(config: ModelConfig) -> dict[str, Any]:
    """The inverse: the public keys of a model's tiling."""
    return {
        "dynamic_image_size": config.max_tiles > 1,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.thumbnail,
    }
