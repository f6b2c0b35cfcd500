"""Reads the reference outputs in a folder and compares the checkpoint with them, by its kind."""

import math
import pathlib
import zipfile

import numpy as np

from hovle_jax.conversion.verify.adapter import verify_adapter
from hovle_jax.conversion.verify.clip import verify_clip
from hovle_jax.conversion.verify.gguf import verify_gguf
from hovle_jax.conversion.verify.hovle import verify_hovle
from hovle_jax.conversion.verify.llm import verify_llm
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.conversion.verify.vision import verify_internvl, verify_tower
from hovle_jax.errors import UserError
from hovle_jax.formats import open_clip, peft
from hovle_jax.formats.families import open_checkpoint

MOST_EXPANSION = 100  # of a compressed array; random numbers and logits hardly shrink
VERIFIERS = {"llm": verify_llm, "teacher": verify_tower, "internvl": verify_internvl, "hovle": verify_hovle}
VERIFIERS |= {"clip": verify_clip}


def verify(folder: str | pathlib.Path) -> Reference:
    """Runs the inputs of `folder`/expected.npz through the checkpoint(s) in the folder and compares the outputs.

    Raises:
      UserError: expected.npz is missing or its inputs make no sense; the checkpoint is missing or not supported.
    """
    folder = pathlib.Path(folder)
    reference = read_reference(folder / "expected.npz")
    files = sorted(folder.glob("*.gguf"))
    if peft.is_adapter(folder):
        verify_adapter(folder, reference)
    elif files and not any((folder / name).is_file() for name in ("config.json", open_clip.CONFIG)):
        for file in files:
            verify_gguf(file, reference)
    else:
        checkpoint = open_checkpoint(folder)
        VERIFIERS[checkpoint.kind](checkpoint, reference)
    reference.check_gradients()
    return reference


def read_reference(path: pathlib.Path) -> Reference:
    """The Reference in a file, nothing compared yet. Raises UserError where it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; verify compares with reference outputs in the checkpoint's folder")
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as arrays:
            return Reference(arrays)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (NumPy, zipfile, zlib and tokenize raise errors of their own)
        raise UserError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None


def _check_size(path):
    """Raises ValueError for a small file that would fill the memory, and for members that are no arrays."""
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            if member.file_size > MOST_EXPANSION * max(member.compress_size, 2**20):
                raise ValueError(
                    f"{member.filename!r} grows from {member.compress_size:,} to {member.file_size:,} bytes"
                )
            if not member.filename.endswith(".npy"):
                raise ValueError(f"{member.filename!r} is no array")
            with file.open(member) as stream:
                _check_array(stream, member)


def _check_array(stream, member):
    """Raises ValueError where the header asks for more than the member has: NumPy takes the memory first."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    size = math.prod(shape) * dtype.itemsize
    if size > member.file_size:
        raise ValueError(f"{member.filename!r} says that it has {size:,} bytes, and there are {member.file_size:,}")
