"""Reading a public config.json: every value by name, nothing guessed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hovle_jax.errors import UserError

REQUIRED = object()


def field(config: Mapping[str, Any], key: str, default: Any = REQUIRED, where: str = "config.json") -> Any:
    """config[key]; give a `default` only where the public code has one.

    Raises:
      UserError: the key is absent and has no default.
    """
    value = config.get(key, default)
    if value is REQUIRED:
        raise UserError(f"{where} lacks {key!r}, which has no public default")
    return value


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def count(
    config: Mapping[str, Any], key: str, default: Any = REQUIRED, where: str = "config.json", minimum: int = 1
) -> int:
    """config[key], an integer of at least `minimum`, or the default as it is."""
    value = field(config, key, default, where)
    if value is default:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{where}: {key}={value!r} must be an integer of at least {minimum}")
    return value


def number(config: Mapping[str, Any], key: str, default: Any = REQUIRED, where: str = "config.json") -> float:
    """config[key] as a positive float."""
    value = field(config, key, default, where)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{where}: {key}={value!r} must be a positive number")
    return float(value)


def colours(
    config: Mapping[str, Any], key: str, default: tuple[float, float, float], where: str = "config.json"
) -> tuple[float, float, float]:
    """config[key], a number for each of red, green and blue; null counts as absent."""
    value = config.get(key)
    value = default if value is None else value
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_number, value)):
        raise UserError(f"{where}: {key}={value!r} must be three numbers")
    red, green, blue = map(float, value)
    return red, green, blue


def flag(config: Mapping[str, Any], key: str, default: Any = REQUIRED, where: str = "config.json") -> bool:
    """config[key], true or false; null counts as false, and strings and numbers are refused."""
    value = field(config, key, default, where)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key}={value!r} must be true or false")
    return value


def table(config: Mapping[str, Any], key: str, default: Any = REQUIRED, where: str = "config.json") -> dict[str, Any]:
    """config[key], a JSON object."""
    value = field(config, key, default, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key}={value!r} must be an object")
    return value


def only(
    config: Mapping[str, Any], key: str, supported: tuple, default: Any = REQUIRED, where: str = "config.json"
) -> Any:
    """config[key]. Raises UserError, with the name, where it is not one of `supported`."""
    value = field(config, key, default, where)
    if value not in supported:
        raise UserError(f"{where}: {key}={value!r} is not supported; supported: {', '.join(map(repr, supported))}")
    return value
