"""Folders and files that appear complete, or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator

from hovle_jax.errors import UserError


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder to write into; renamed to `folder` when the block succeeds, and removed otherwise.

    Raises:
      UserError: `folder` exists and is not empty, or it cannot be written (a full disk, no permission).
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another name, or remove it")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; choose another folder, or remove that one")
    with _partial(folder) as partial:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.chmod(0o777 & ~_umask())  # a temporary folder is private to its owner
        partial.rename(folder)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The path of a temporary file to write; renamed to `path` when the block succeeds, and removed otherwise.

    Raises:
      UserError: `path` exists, or it cannot be written (a full disk, no permission).
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise UserError(f"{path} exists; choose another name, or remove it")
    with _partial(path) as folder:
        yield folder / path.name
        (folder / path.name).rename(path)


@contextlib.contextmanager
def _partial(target):
    """A temporary folder beside `target`, which is removed; errors of writing become UserError."""
    new_parents = [parent for parent in target.parents if not parent.exists()]
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
        yield partial
    except (OSError, ValueError) as error:
        number = _errno(error)
        if number is None:
            raise
        reason = "the disk is full" if number == errno.ENOSPC else os.strerror(number)
        raise UserError(f"cannot write {target}: {reason}; nothing was left behind") from None
    finally:
        if partial is not None:
            _remove(partial)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # in use
                parent.rmdir()


def _errno(error):
    """The errno of an error, also of tensorstore's, which has it in its text; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match.group(1)) if match else None


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(folder):
    """Removes a folder, although threads of a failed write may still create files in it."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
