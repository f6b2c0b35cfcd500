"""Nested dicts <-> frozen dataclasses, and what differs between two dicts."""

import dataclasses
import difflib
import types
import typing

from hovle_jax.errors import UserError


def from_dict(cls, mapping, path="config"):
    """A frozen dataclass from a nested mapping.

    Raises:
      UserError: an unknown or missing key, with the nearest known ones, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in dict(mapping).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3) or sorted(fields)
            raise UserError(f"{path}.{key} is not a known key; did you mean {', '.join(near)}?")
        values[key] = _convert(hints[key], value, f"{path}.{key}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return cls(**values)


def _convert(hint, value, path):
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path}={value!r} should be of type {hint.__name__}")
    return value


def differences(old, new, path=""):
    """Dotted paths at which two nested dicts differ, with both values: [(path, old, new)]."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        as_list = lambda v: list(v) if isinstance(v, (list, tuple)) else v  # JSON has no tuples
        return [] if as_list(old) == as_list(new) else [(path, old, new)]
    found = []
    for key in sorted(old.keys() | new.keys()):
        found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found
