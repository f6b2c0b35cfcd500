"""The reference outputs of a folder, read and compared by what the checkpoint is."""

import pathlib
import zipfile

import numpy as np

from hovle_jax.conversion.verify.gguf import verify_gguf
from hovle_jax.conversion.verify.hovle import verify_hovle
from hovle_jax.conversion.verify.llm import verify_llm
from hovle_jax.conversion.verify.report import Report
from hovle_jax.conversion.verify.vision import verify_internvl, verify_tower
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint

VERIFIERS = {"llm": verify_llm, "teacher": verify_tower, "internvl": verify_internvl, "hovle": verify_hovle}


def verify(folder: str | pathlib.Path) -> Report:
    """Runs the inputs of `folder`/expected.npz through the checkpoint(s) in the folder.

    Raises:
      UserError: no expected.npz, inputs that make no sense, no checkpoint, or one that is not supported.
    """
    folder = pathlib.Path(folder)
    report = read_report(folder / "expected.npz")
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        for file in files:
            verify_gguf(file, report)
    else:
        checkpoint = open_checkpoint(folder)
        VERIFIERS[checkpoint.kind](checkpoint, report)
    report.check_gradients()
    return report


def read_report(path: pathlib.Path) -> Report:
    """A Report of the arrays in a file, nothing compared yet. Raises UserError where they cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; verify compares with reference outputs beside the checkpoint")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Report(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
