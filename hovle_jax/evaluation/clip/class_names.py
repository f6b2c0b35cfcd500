"""Names of classes: checked, and read from the file that may lie beside images."""

import collections
import os
import pathlib
from collections.abc import Sequence

from hovle_jax.errors import UserError
from hovle_jax.system.printable import printable

NAMES_FILE = "classnames.txt"  # one a line, in the order of the classes, as suites of zero-shot tests have it


def check_names(names: Sequence[str], source: str | os.PathLike) -> None:
    """Raises UserError for a class that is named twice, whatever its capitals, or not at all."""
    counts = collections.Counter(" ".join(name.lower().split()) for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{source} names the class {printable(twice[0])!r} twice; give each class a name of its own")
    if "" in counts:
        raise UserError(f"{source} has a class without a name (number {list(map(str.strip, names)).index('')})")


def names_beside(folder: str | os.PathLike, count: int = 0) -> tuple[str, ...]:
    """The names in FOLDER/classnames.txt; empty if there is no such file.

    Args:
      count: how many classes there are; 0 = unknown.
    Raises:
      UserError: the file names more or fewer.
    """
    path = pathlib.Path(folder) / NAMES_FILE
    if not path.is_file():
        return ()
    names = read_lines(path)
    if count and len(names) != count:
        raise UserError(f"{path} names {len(names)} classes, and there are {count}; a line is the name of one class")
    return names


def read_lines(path: str | os.PathLike) -> tuple[str, ...]:
    """A text file's lines that are not empty. Raises UserError if it cannot be read."""
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8; save it as such") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
