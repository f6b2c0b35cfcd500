"""How InternVL's public config.json says into how many tiles an image is cut."""

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.formats.fields import count, field


def tiling_from_json(config: dict, where: str = "config.json") -> dict:
    """A public config -> the tiling's fields of `ModelConfig`; keys that it lacks have the defaults of these.

    Raises:
      UserError: a number of tiles that is none, or fewest above most.
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


def tiling_to_json(config: ModelConfig) -> dict:
    """The inverse: the public keys of a model's tiling."""
    return {
        "dynamic_image_size": config.max_tiles > 1,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.thumbnail,
    }
