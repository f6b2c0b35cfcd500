"""What a run reads: one source, or a mixture of several, each repeated so many times in an epoch.

InternVL's meta file is a JSON object {name: {"annotation", "root", "repeat_time", "data_augment",
"max_dynamic_patch"}}. Here an annotation may be of any kind that `sources` reads, and entries may have a "weight"
instead of a repeat_time.
"""

import dataclasses
import difflib
import json
import os

import numpy as np

from hovle_jax.data.files import storage
from hovle_jax.data.files.sources import Source, open_source
from hovle_jax.errors import UserError

META_KEYS = ("annotation", "root", "repeat_time", "weight", "data_augment", "max_dynamic_patch", "length", "split")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A source of a mixture.

    Attributes:
      repeat: how many times an epoch has it; below 1, its leading fraction (InternVL's `repeat_time`).
      augment: one JPEG compression of each tile; None = the run's setting.
      max_tiles: of each of its images; None = the run's setting.
    """

    source: Source
    repeat: float = 1.0
    augment: bool | None = None
    max_tiles: int | None = None

    @property
    def used(self) -> int:
        """How many of its samples, the leading ones, an epoch has at least once."""
        return min(len(self.source), max(1, int(len(self.source) * self.repeat + 1e-9)))

    def copies(self) -> np.ndarray:
        """[n] int64: how many times an epoch has each of its samples."""
        whole, rest = divmod(self.repeat, 1)
        counts = np.full(len(self.source), int(whole), np.int64)
        counts[: int(len(counts) * rest + 1e-9)] += 1
        if not counts.any():
            counts[0] = 1
        return counts


def open_mixture(path: str | os.PathLike, split: str = "train", outside_root: bool = False) -> list[Entry]:
    """The entries that data.source names: a meta file, or a source.

    Args:
      split: of folders that have several, unless one is named.
      outside_root: the rows' image paths may lead out of their `root`.
    Raises:
      UserError: a file is missing or of an unknown kind, or an entry cannot be understood.
    """
    if str(path).endswith(".json"):
        return _read_meta(str(path), split, outside_root)
    source = open_source(path, split=split, outside_root=outside_root)
    _check_not_empty(source, path)
    return [Entry(source)]


def _check_not_empty(source, path):
    if not len(source):
        raise UserError(f"{path} has no samples")


def _read_meta(path, split, outside_root):
    path, *more = storage.expand(path)
    if more:
        raise UserError(f"{path} and {len(more)} more meta files are named; a run reads one, which names all sources")
    try:
        meta = json.loads(storage.stream(path).read())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    described = (
        isinstance(meta, dict)
        and meta
        and all(isinstance(v, dict) and isinstance(v.get("annotation"), str) for v in meta.values())
    )
    if not described:
        raise UserError(
            f"{path} is no meta file: each entry needs an 'annotation'; rows themselves belong in a .jsonl, one a line "
            f"(python -m hovle_jax.prepare jsonl {path} OUT makes one of a JSON list)"
        )
    weighted = [name for name, entry in meta.items() if "weight" in entry]
    if weighted and len(weighted) < len(meta):
        raise UserError(f"{path}: {weighted[0]!r} has a weight and others have none; give one to each, or repeat_time")
    entries = [_entry(name, values, path, split, outside_root) for name, values in meta.items()]
    if weighted:
        weights = [_number(values, "weight", name, path) for name, values in meta.items()]
        entries = _balance(entries, weights)
    return entries


def _entry(name, values, path, split, outside_root):
    for key in values:
        near = difflib.get_close_matches(key, META_KEYS, n=1, cutoff=0.75)
        if key not in META_KEYS and near:
            raise UserError(f"{path}: {name!r} has an unknown key {key!r}; did you mean {near[0]!r}?")
    annotation, root = _near(values["annotation"], path), _near(values.get("root") or "", path)
    source = open_source(annotation, name, root, values.get("split", split), outside_root)
    _check_not_empty(source, annotation)
    repeat = _number(values, "repeat_time", name, path)
    max_tiles = values.get("max_dynamic_patch")
    if max_tiles is not None and (type(max_tiles) is not int or max_tiles < 1):
        raise UserError(f"{path}: {name!r} has max_dynamic_patch={max_tiles!r}, which should be a number above 0")
    augment = values.get("data_augment")
    if augment is not None and not isinstance(augment, bool):
        raise UserError(f"{path}: {name!r} has data_augment={augment!r}, which should be true or false")
    return Entry(source, repeat, augment, max_tiles)


def _number(values, key, name, path):
    value = values.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise UserError(f"{path}: {name!r} has {key}={value!r}, which should be a number above 0")
    return float(value)


def _near(path, meta):
    """A path in a meta file: relative to the working folder, as in InternVL, or else to the meta file."""
    if "::" in path:
        raise UserError(f"{meta} names {path}: a meta file names files and URLs, no chain of file systems")
    if not path or storage.is_url(path) or os.path.isabs(path):
        return path
    beside = storage.join(meta.rpartition("/")[0], path)
    try:
        storage.expand(path)
    except UserError:
        return beside
    return path


def _balance(entries, weights):
    """Repeats that give each entry its weight's share of the samples, and an epoch every sample at least once."""
    per_sample = [weight / len(entry.source) for entry, weight in zip(entries, weights)]
    return [dataclasses.replace(e, repeat=value / min(per_sample)) for e, value in zip(entries, per_sample)]
