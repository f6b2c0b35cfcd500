"""Public checkpoint folders: config.json and one or many .safetensors files."""

import json
import pathlib

import numpy as np
from safetensors import safe_open

from hovle_jax.errors import UserError

INDEX = "model.safetensors.index.json"


def load_config(folder):
    """-> the dict of `folder`/config.json."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; a public checkpoint is a folder with config.json and .safetensors files"
        )
    return json.loads(path.read_text())


def load_tensors(folder, prefixes=("",)):
    """Reads a folder's tensors as float32, the type of our masters (exact from bfloat16 and float16).

    Args:
      folder: holds one .safetensors file, or several with or without an index.
      prefixes: only tensors whose names start with one of them are read from disk.
    Returns:
      {public name: numpy array}.
    Raises:
      UserError: no file, a file or tensor of the index is missing, or a tensor lies in two files.
    """
    folder = pathlib.Path(folder)
    index = _index(folder)
    tensors = {}
    for path in _files(folder, index):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                if not name.startswith(tuple(prefixes)):
                    continue
                if name in tensors:
                    raise UserError(f"{folder}: tensor {name} lies in more than one file")
                tensors[name] = np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)
    missing = sorted(n for n in index if n.startswith(tuple(prefixes)) and n not in tensors)
    if missing:
        raise UserError(f"{folder}: the files lack tensors that {INDEX} lists: {', '.join(missing)}")
    return tensors


def _index(folder):
    """{tensor name: file name} of the index; empty without one."""
    path = folder / INDEX
    return json.loads(path.read_text())["weight_map"] if path.is_file() else {}


def _files(folder, index):
    paths = sorted(folder / name for name in set(index.values())) or sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if not paths or missing:
        raise UserError(f"{folder} lacks {', '.join(missing) or 'a .safetensors file'}")
    return paths
