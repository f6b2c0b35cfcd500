"""TFDS data sets, whose folders TFDS trusts more than one should trust a folder that was downloaded.

TFDS imports whatever module `features.json` names as that of a feature, and opens files by patterns that
`dataset_info.json` holds. So both are read here first.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.shard import Shard
from hovle_jax.errors import UserError
from hovle_jax.system.printable import printable

OWN_CLASS = re.compile(r"tensorflow_datasets(\.\w+)+", re.ASCII)
CLASS_KEYS = ("pythonClassName", "python_class_name", "type", "proto_cls")  # the last two as TFDS 3 wrote them
# Of dataset_info.json: names of files are made of these.
FILE_KEYS = (
    "name", "configName", "config_name", "version", "fileFormat", "file_format", "filepathTemplate",
    "filepath_template", "alternativeFileFormats", "alternative_file_formats",
)  # fmt: skip
LARGEST_JSON = 2**26  # bytes


@dataclasses.dataclass(frozen=True)
class TfdsShard(Shard):
    """A split of a prepared TFDS data set (a folder with dataset_info.json), images left encoded."""

    split: str

    def _data(self):
        return self.opened(lambda: _tfds_source(self.path, self.split))

    def __len__(self) -> int:
        return len(self._data())

    def row(self, index: int) -> dict[str, Any]:
        data = self._data()
        try:
            row = data[index]
        except Exception as error:  # noqa: BLE001 (as in _tfds_source)
            raise BadSample("broken_record", error) from None
        return {key: _plain(value) for key, value in row.items()}

    def class_names(self, field: str) -> tuple[str, ...]:
        path = pathlib.Path(self.path) / f"{field}.labels.txt"
        inside = path.parent == pathlib.Path(self.path) and path.is_file()
        return tuple(line.strip() for line in _text(path).splitlines() if line.strip()) if inside else ()


def _tfds_source(path, split):
    import logging

    check_tfds_folder(path)
    absl = logging.getLogger("absl")
    absl.setLevel(max(absl.level, logging.ERROR))  # a command may have silenced more
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(path)  # TFDS's own types are too narrow
        features = builder.info.features.items()
        encoded = {k: tfds.decode.SkipDecoding() for k, f in features if isinstance(f, tfds.features.Image)}
        return builder.as_data_source(split, decoders=encoded)
    except Exception as error:  # noqa: BLE001 (tfds raises anything)
        raise UserError(f"{path} has no split {split!r} that TFDS reads as ArrayRecord: {error}") from None


def _plain(value):
    """TFDS's numpy values as plain ones: texts as str, encoded images as bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return value.item() if isinstance(value, np.generic) else value


# ---------------------------------------------------------------------------------------------------------------------
# What the folder says of itself


def check_tfds_folder(folder: str) -> None:
    """Raises UserError for a folder whose descriptions name classes that are not TFDS's, or files elsewhere."""
    for path in (pathlib.Path(folder) / "features.json", pathlib.Path(folder) / "dataset_info.json"):
        check = _check_features if path.name == "features.json" else _check_files
        try:
            if path.is_file():
                for key, value in _pairs(_text(path)):
                    check(path, key, value)
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None


def _text(path):
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.stat().st_size:,} bytes, and at most {LARGEST_JSON:,} are read")
    return path.read_text("utf-8")


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    """All (key, value) of the objects in a JSON text, doubled keys too; texts that are JSON themselves are opened."""
    found = []

    def keep(pairs):
        found.extend(pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=keep)
    yield from found
    for _, value in found:
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError):
                yield from _pairs(value)


def _check_features(path, key, value):
    if key in CLASS_KEYS and isinstance(value, str) and "." in value and not OWN_CLASS.fullmatch(value):
        raise UserError(
            f"{path} names the class {printable(value)[:200]!r}, whose code TFDS would run; only classes of "
            "tensorflow_datasets are read: save the data set without it"
        )


def _check_files(path, key, value):
    values = value if isinstance(value, list) else [value]
    for text in values:
        if key in FILE_KEYS and isinstance(text, str) and ("/" in text or "\\" in text or "\0" in text):
            raise UserError(f"{path} has {key}={printable(text)[:200]!r}, which names files elsewhere")
