"""Where the tensors of a public checkpoint are stored: described by their headers, read one at a time."""

import json
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from hovle_jax.errors import UserError
from hovle_jax.formats.fields import read_object

INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")  # which float32 holds exactly
# In old checkpoints of Llama and of CLIP: computed, and ignored by public code too.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
COUNTERS = ("num_batches_tracked",)  # of batch norm, int64; float32 holds them up to 2^24
MOST_HEADER = 2**24  # bytes; a shard of the largest models has a hundredth of it
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorSource(Protocol):
    """Tensors by their public names.

    Attributes:
      shapes: {tensor name: shape} of all of them; reads no tensor.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, /) -> np.ndarray:
        """One tensor, float32."""
        ...

    def file_of(self, name: str | None, /) -> pathlib.Path:
        """The file that a tensor is in; for None the checkpoint's file or folder. For messages."""
        ...


def is_counter(name: str) -> bool:
    """Whether a tensor counts: it is int64 in files, and float32 here."""
    return name.endswith(COUNTERS)


class SafetensorsFolder:
    """One .safetensors file, or several with or without an index.

    A folder may hold one model in two layouts; `stem` names the files of one of them.

    Args:
      stem: what the names of its files begin with, where there are such files.
      without: what they do not begin with.

    Attributes:
      shapes: {tensor name: shape}, from the headers alone.
      dtype: the narrowest type that represents all tensors exactly: 'bfloat16' or 'float32'.

    Raises:
      UserError: no such file, pickle files instead, a file or tensor that the index lists is missing, a truncated
        file, a tensor in two files.
    """

    def __init__(self, folder: str | os.PathLike, stem: str = "", without: str = ""):
        self.folder, self._stem, self._without = pathlib.Path(folder), stem, without
        index = self._index()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, pathlib.Path] = {}
        dtypes = set()
        for path in self._paths(index):
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                    if name.endswith(NOT_WEIGHTS):
                        continue
                    if name in self._files:
                        raise UserError(
                            f"{self.folder}: tensor {name} is in {self._files[name].name} and in {path.name}"
                        )
                    tensor = file.get_slice(name)
                    known = ("I64",) if is_counter(name) else DTYPES
                    if tensor.get_dtype() not in known:
                        kinds = ", ".join(known)
                        raise UserError(f"{path}: {name} has the type {tensor.get_dtype()}; supported: {kinds}")
                    dtypes.add(tensor.get_dtype())
                    self._files[name] = path
                    self.shapes[name] = tuple(tensor.get_shape())
        self.dtype = "bfloat16" if dtypes - {"I64"} == {"BF16"} else "float32"
        missing = sorted(name for name in set(index) - set(self.shapes) if not name.endswith(NOT_WEIGHTS))
        if missing:
            raise UserError(f"{self.folder}: the files lack tensors that {INDEX} lists: {', '.join(missing)}")

    def read(self, name: str) -> np.ndarray:
        """-> float32 array (exact from bfloat16 and float16).

        The file is opened for each tensor, so that no more than one tensor's pages stay in memory.
        """
        with _open(self._files[name], known=True) as file:
            return np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)

    def _index(self):
        """{tensor name: file name}; empty without an index."""
        path = self.folder / INDEX
        if self._stem or not path.is_file():
            return {}
        files = read_object(path).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise UserError(f"{path} is not an index of safetensors files: its weight_map must be {{tensor: file}}")
        outside = sorted({name for name in files.values() if not _is_file_name(name)})
        if outside:
            raise UserError(f"{path} names {outside[0][:100]!r}: it must name files in its own folder")
        return files

    def file_of(self, name: str | None) -> pathlib.Path:
        """The file that a tensor is in; for None the folder."""
        return self.folder if name is None else self._files.get(name, self.folder)

    def _paths(self, index):
        if index:
            paths = [self.folder / name for name in sorted(set(index.values()))]
            missing = [path.name for path in paths if not path.exists()]
            if missing:
                raise UserError(f"{self.folder} lacks {', '.join(missing)}, which {INDEX} names")
        else:
            paths = sorted(self.folder.glob("*.safetensors"))
            named = [path for path in paths if path.name.startswith(self._stem)]
            paths = [path for path in named or paths if not (self._without and path.name.startswith(self._without))]
        for path in paths:
            check_regular(path)
        if not paths:
            pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
            if pickles:
                raise UserError(
                    f"{self.folder} holds its weights as pickle files ({pickles[0]}), which can run any code when they "
                    "are read; get the safetensors version, or convert them with safetensors' own convert script"
                )
            raise UserError(f"{self.folder} lacks a .safetensors file")
        return paths


def _is_file_name(name):
    """Whether it can be a file in its own folder."""
    plain = name.isprintable() and name not in ("", ".", "..") and len(name.encode("utf-8", "replace")) < 256
    return plain and pathlib.PurePosixPath(name).name == name and "\\" not in name


def check_regular(path: pathlib.Path) -> None:
    """Raises UserError for what cannot be read as a file: opening a pipe would wait forever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:  # a link to itself, or to nothing
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file (a folder, a pipe or a device); download it again")


def _open(path, known=False):
    try:
        if not known:
            _check_header(path)
        return safe_open(path, framework="numpy")
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); download it again") from None


def _check_header(path):
    """Raises ValueError for what the library reads past: a header that takes all memory, a name that is there twice."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header has {length:,} bytes, and the file {size:,}")
        if length > MOST_HEADER:
            raise ValueError(f"its header has {length:,} bytes; {MOST_HEADER:,} are possible")
        json.loads(file.read(length), object_pairs_hook=_without_doubles)


def _without_doubles(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double[:100]!r} is there twice")
    return found
