"""Folders and files that appear complete, or not at all."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

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


def write_whole(path: str | os.PathLike, content: str | bytes, synced: bool = True) -> None:
    """Replaces a small file: a kill, or a machine that goes down, leaves the old content or the new one.

    Args:
      synced: wait until it is on the disk; False for what is written often and may be lost with the machine.
    Raises:
      UserError: it cannot be written.
    """
    path = pathlib.Path(path)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        fresh.replace(path)
        if synced:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise UserError(f"cannot write {path}: {reason_of(error)}; what was there before is whole") from None


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Removes what killed processes were about to put in place by `write_whole`; nobody may be writing there now."""
    for path in pathlib.Path(folder).glob("*.partial"):
        if path.stem.rpartition(".")[2].isdecimal():  # a process
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, synced: bool = True) -> None:
    """`write_whole` of a value as indented JSON."""
    write_whole(path, json.dumps(value, indent=2) + "\n", synced)


def read_json(path: str | os.PathLike, needs: Sequence[str] = (), remedy: str = "bring it back, or remove it") -> Any:
    """The value in a JSON file that the project wrote.

    Args:
      needs: keys of an object that must be there; none = any value will do.
      remedy: ends the message.
    Raises:
      UserError: there is no such file, or it is empty, cut short or damaged.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}; {remedy}") from None
    return parse_json(content, path, needs, remedy)


def parse_json(
    content: bytes, path: str | os.PathLike, needs: Sequence[str] = (), remedy: str = "bring it back, or remove it"
) -> Any:
    """`read_json` of a file's content; `path` names it."""
    try:
        value = json.loads(content) if content.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); {remedy}") from None
    if not content.strip():
        raise UserError(f"{path} is empty; {remedy}")
    missing = [key for key in needs if not isinstance(value, dict) or key not in value]
    if missing:
        raise UserError(f"{path} is damaged: it has no {missing[0]!r}; {remedy}")
    return value


def sync_folder(folder: str | os.PathLike) -> None:
    """Waits until the names in a folder are on the disk; nothing where the system has no such call for folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """Why something could not be read or written, in one line; also of errors that tensorstore raises."""
    number = errno_of(error)
    if number is not None and number in errno.errorcode:  # a look-up of a name has numbers of its own
        return "the disk is full" if number == errno.ENOSPC else os.strerror(number)
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


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
        if errno_of(error) is None:
            raise
        raise UserError(f"cannot write {target}: {reason_of(error)}; nothing was left behind") from None
    finally:
        if partial is not None:
            _remove(partial)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # in use
                parent.rmdir()


def errno_of(error: BaseException) -> int | None:
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
