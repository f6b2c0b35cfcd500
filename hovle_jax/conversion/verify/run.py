"""Reads the reference outputs in a folder and compares the checkpoint with them, by its kind."""

import pathlib
import zipfile

import numpy as np

from hovle_jax.conversion.verify.gguf import verify_gguf
from hovle_jax.conversion.verify.hovle import verify_hovle
from hovle_jax.conversion.verify.llm import verify_llm
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.conversion.verify.vision import verify_internvl, verify_tower
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint

VERIFIERS = {"llm": verify_llm, "teacher": verify_tower, "internvl": verify_internvl, "hovle": verify_hovle}


def verify(folder: str | pathlib.Path) -> Reference:
    """Runs the inputs of `folder`/expected.npz through the checkpoint(s) in the folder and compares the outputs.

    Raises:
      UserError: expected.npz is missing or its inputs make no sense; the checkpoint is missing or not supported.
    """
    folder = pathlib.Path(folder)
    reference = read_reference(folder / "expected.npz")
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
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
        with np.load(path, allow_pickle=False) as arrays:
            return Reference(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
