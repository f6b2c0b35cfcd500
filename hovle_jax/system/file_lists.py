"""FOLDER/files.json: the size and sha256 of every file below a folder, so that damage is seen before it is used.

Neither file systems nor array stores check what they give back: a flipped bit in a weight loads without a word. The
list is written last, so it also marks that the folder is complete. It has a digest of itself. Where a service keeps the
md5 of what it stores, the list has that instead.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.system.files import parse_json, write_whole

FILE_NAME = "files.json"
THREADS = 4  # hashing leaves Python's lock alone; each thread holds one buffer of 256 KiB
Files = dict[str, dict[str, Any]]  # path below the folder -> {"bytes", "sha256"}, or "md5" instead


def write_list(folder: str | os.PathLike, note: Mapping[str, Any] | None = None) -> None:
    """Writes FOLDER/files.json over all files that lie there now.

    Args:
      note: JSON values to keep in it, as the step of a checkpoint.
    """
    folder = pathlib.Path(folder)
    write_whole(folder / FILE_NAME, text_of(measured(folder), note or {}))


def write_note(folder: str | os.PathLike, note: Mapping[str, Any]) -> None:
    """Adds to the note of FOLDER/files.json; nothing where there is no list. Raises UserError: it is damaged."""
    listed = read_list(folder)
    if listed:
        write_whole(pathlib.Path(folder) / FILE_NAME, text_of(listed[0], {**listed[1], **note}))


def measured(folder: pathlib.Path, below: str = "") -> Files:
    """The files that lie in a folder now, but for its list; reads every byte of them.

    Args:
      below: a folder in it: only the files of that one.
    """
    paths = [path for path in (folder / below).rglob("*") if path.is_file() and path != folder / FILE_NAME]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _measured(folder / name), names)
        return dict(zip(names, found, strict=True))


def read_list(folder: str | os.PathLike) -> tuple[Files, dict[str, Any]] | None:
    """-> (files, note) of FOLDER/files.json; None where there is no list.

    Raises:
      UserError: the list itself is damaged.
    """
    path = pathlib.Path(folder) / FILE_NAME
    if not path.exists():
        return None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parsed(text, str(path))


def parsed(text: bytes, where: str) -> tuple[Files, dict[str, Any]]:
    """`read_list` of a list's text."""
    content = parse_json(text, where, ["files", "note", "sha256"])
    if text != text_of(content["files"], content["note"]).encode():
        raise UserError(f"{where} is damaged: its content and its own sha256 do not agree")
    return content["files"], content["note"]


def damage(folder: str | os.PathLike, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with the files of a folder, as its list has them: a line for each; [] without a list.

    Reads every byte of them.

    Args:
      names: only these files; None = all.
    """
    folder = pathlib.Path(folder)
    try:
        listed = read_list(folder)
    except UserError as error:
        return [str(error).partition("; ")[0]]
    if listed is None:
        return []
    wanted = listed[0] if names is None else {name: listed[0][name] for name in names}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda item: _difference(folder, *item), wanted.items())
        return [line for line in found if line]


def named(lines: list[str], most: int = 3) -> str:
    """The first lines of `damage` as one."""
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def _difference(folder: pathlib.Path, name: str, listed: dict[str, Any]) -> str:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != listed["bytes"]:
            return f"{name} has {size:,} bytes, not {listed['bytes']:,}"
        kind = "md5" if "md5" in listed else "sha256"
        return "" if _measured(path, kind) == listed else f"{name} is not what was written (its {kind} differs)"
    except OSError as error:
        return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"


def _measured(path: pathlib.Path, kind: str = "sha256") -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
        return {"bytes": file.tell(), kind: digest}


def text_of(files: Files, note: Mapping[str, Any]) -> str:
    """A list as it is written, with the digest of what is in it."""
    content = {"note": dict(note), "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1) + "\n"
