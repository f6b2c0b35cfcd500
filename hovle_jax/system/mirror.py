"""A work folder at a URL (gs://, s3://, whatever fsspec opens): one works in a local copy, and what changes is sent.

The URL is the truth. A start takes what lies there and forgets an earlier local copy. Folders that have a list of their
files (checkpoints, models) are complete with that list, which is sent last; what a killed process left there without
one is removed. All else of a run is sent before its checkpoint: a resumed run finds all rows up to there.
"""

import concurrent.futures
import fcntl
import fnmatch
import hashlib
import logging
import pathlib
import shutil
import threading
from collections.abc import Iterable
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.cache import cache_dir
from hovle_jax.system.files import reason_of

THREADS = 8  # files that travel at a time
UNFINISHED = ("*.partial", "*.deleting", "*.orbax-checkpoint-tmp*", ".lock")
LISTED = ("checkpoints", "model")  # folders below a run that are complete with a list
PROBE = ".can_be_written"


def is_url(place: str) -> bool:
    """Whether a folder is given by a URL."""
    return "://" in place


class Mirror:
    """A folder at a URL, and its local copy.

    Attributes:
      url: without a slash at its end.
      folder: the local copy.
    Raises:
      UserError: nothing can open this URL, or it cannot be listed and written.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = cache_dir("workdirs", hashlib.sha256(self.url.encode()).hexdigest()[:16])
        self._fs, self._root = _opened(self.url)
        self._hold = _held(self.folder.with_name(f"{self.folder.name}.lock"), self.url)
        self._sent: dict[str, tuple[int, int]] = {}  # what lies at the URL: name -> size and time of the local file
        self._lock = threading.Lock()
        self._try("be written", self._probe)

    def pull(self) -> None:
        """Replaces the local copy by what lies at the URL."""
        names = self._try("be listed", self._names)
        whole = [name for name in names if _is_complete(name, names)]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._try("be read", lambda: _all(self._take, whole))
        self._sent = {name: _state(self.folder / name) for name in whole}
        self._try("be written", lambda: _all(self._remove, sorted(names - set(whole))))

    def push(self) -> None:
        """Sends what has changed, and removes what is gone. Raises UserError where that fails."""
        with self._lock:
            found = {name: _state(self.folder / name) for name in self._local_names()}
            changed = [name for name, state in found.items() if self._sent.get(name) != state]
            gone = sorted(self._sent.keys() - found.keys(), key=lambda name: not _is_list(name))
            for part in _in_turns(changed):
                self._try("be written", lambda part=part: _all(self._send, part))
                self._sent |= {name: found[name] for name in part}
            for name in gone:  # a list first: what has none is no checkpoint
                self._try("be written", lambda name=name: self._remove(name))
                del self._sent[name]

    def _names(self) -> set[str]:
        if not self._fs.exists(self._root):
            return set()
        return {path.removeprefix(self._root).strip("/") for path in self._fs.find(self._root)} - {PROBE, ""}

    def _local_names(self) -> list[str]:
        paths = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        unfinished = lambda path: any(fnmatch.fnmatch(part, one) for part in path.parts for one in UNFINISHED)
        return sorted(path.as_posix() for path in paths if not unfinished(path))

    def _take(self, name):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{name}", str(self.folder / name))

    def _send(self, name):
        target = f"{self._root}/{name}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)  # no effect where there are no folders
        if _is_listed(name) and not _is_list(name):
            self._fs.put_file(str(self.folder / name), target)
        else:  # small, and may grow meanwhile
            self._fs.pipe_file(target, (self.folder / name).read_bytes())

    def _remove(self, name):
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def _probe(self):
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{PROBE}", b"x")
        self._fs.rm_file(f"{self._root}/{PROBE}")

    def _try(self, what, do):
        try:
            return do()
        except Exception as error:  # each service's own
            raise UserError(
                f"{self.url} cannot {what}: {reason_of(error)}; check the URL and the credentials (for gs://: gcloud "
                "auth application-default login, or a service account)"
            ) from error


def _held(path: pathlib.Path, url: str) -> Any:
    """A file that is locked until this process ends. Raises UserError where another one has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process of this machine works on {url}; wait for it, or end it first") from None
    return file


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    if "::" in url:
        raise UserError(f"{url}: a work folder is one URL, not a chain of them")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it says what it also raises, and each try before
    try:
        found, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{url} cannot be opened: {reason_of(error)}; install what opens it (gs://: pip install gcsfs, s3://: "
            "s3fs), or give a folder"
        ) from None
    except Exception as error:  # credentials that are broken
        raise UserError(f"{url} cannot be opened: {reason_of(error)}") from error
    return found, root.rstrip("/")


def _is_listed(name: str) -> bool:
    return any(part in LISTED for part in name.split("/")[:-1])


def _is_list(name: str) -> bool:
    return name.rpartition("/")[2] == file_lists.FILE_NAME


def _is_complete(name: str, names: set[str]) -> bool:
    """Whether a file is needed: those of a checkpoint or a model are where its list is too."""
    parts = name.split("/")
    places = [i for i, part in enumerate(parts[:-1]) if part in LISTED]
    if not places:
        return True
    end = places[0] + (2 if parts[places[0]] == "checkpoints" else 1)
    return "/".join([*parts[:end], file_lists.FILE_NAME]) in names


def _in_turns(names: Iterable[str]) -> list[list[str]]:
    """What is sent together: a run's small files, then arrays, then their lists."""
    turns: list[list[str]] = [[], [], []]
    for name in names:
        turns[2 if _is_list(name) else 1 if _is_listed(name) else 0].append(name)
    return turns


def _state(path: pathlib.Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _all(do, names):
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(do, names))
