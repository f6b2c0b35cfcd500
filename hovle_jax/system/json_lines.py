"""Files that lines of JSON are added to as they come, so that an interrupted command goes on where it was."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from hovle_jax.errors import UserError


def whole_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a file, none where there is none; one that was not written to its end is cut off."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + bool(whole))
    return whole.decode("utf-8", "replace").split("\n") if whole else []


@contextlib.contextmanager
def adding_to(path: str | os.PathLike, remedy: str = "give another file") -> Iterator[Callable[[Any], None]]:
    """A function that adds a value as a line, which is on its way to the disk when it returns.

    Raises:
      UserError: the file cannot be written; `remedy` ends the message.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:

            def add(value):
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                file.flush()

            yield add
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
