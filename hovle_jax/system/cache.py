"""The one folder, apart from a run's own, that the project writes to."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


def cache_dir(*parts: str) -> pathlib.Path:
    """A folder inside `HOVLE_CACHE`, by default hovle_jax in the user's cache; created if missing."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hovle_jax"
    path = pathlib.Path(os.environ.get("HOVLE_CACHE") or default).joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder: one process at a time enters, so that two do not prepare the same thing at once."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
