"""A work folder at a URL: one works in a local copy, and what changes is sent.

The URL is the truth. A start takes what lies there and forgets an earlier local copy. Folders that have a list of their
files (checkpoints, models) are complete with that list, which is sent last; what a killed process left there without
one is removed. All else of a run is sent before its checkpoint: a resumed run finds all rows up to there.

One run at a time works there: a start signs the folder, and a run that finds another signature sends nothing any more.

Several hosts have a copy each. They send what they have written themselves, and take what the others have sent
(`hosts.exchange`). Checkpoints are in none of these copies: the hosts write their parts of one straight to the URL.
"""

import fcntl
import fnmatch
import hashlib
import os
import pathlib
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.cache import cache_dir
from hovle_jax.system.printable import printable
from hovle_jax.system.remote import Entry, Remote

UNFINISHED = ("*.partial", "*.deleting", "*.orbax-checkpoint-tmp*", ".lock")
CHECKPOINTS = "checkpoints"
LISTED = (CHECKPOINTS, "model")  # folders below a run that are complete with a list
SIGNATURE = ".signed_by"  # of the run that works there


class Mirror:
    """A folder at a URL, and its local copy.

    Args:
      shared: several hosts have a copy each.
      leads: this host is the first of them, which alone removes what is gone.
    Attributes:
      url: without a slash at its end.
      remote: the folder there.
      folder: the local copy.
    Raises:
      UserError: nothing can open this URL, or it cannot be listed and written, or not by several hosts.
    """

    def __init__(self, url: str, shared: bool = False, leads: bool = True) -> None:
        self.remote, self.shared, self._leads = Remote(url), shared, leads
        self.url = self.remote.url
        self.folder = cache_dir("workdirs", hashlib.sha256(self.url.encode()).hexdigest()[:16])
        self._hold = _held(self.folder.with_name(f"{self.folder.name}.lock"), self.url)
        self._sent: dict[str, tuple[int, int]] = {}  # what lies at the URL: name -> size and time of the local file
        self._seen: dict[str, str] = {}  # versions there, of what other hosts sent
        self._own: set[str] = set()  # what this host has sent
        self._lock = threading.Lock()
        started = time.strftime("%F %T %Z")
        self._signature = f"process {os.getpid()} of {socket.gethostname()}, started {started}, {secrets.token_hex(4)}"
        if shared:
            self.remote.path_for_arrays()
        self.remote.check_writable()

    def pull(self) -> None:
        """Replaces the local copy by what lies at the URL; the first of several hosts does so before the others."""
        found = self._entries()
        whole = [name for name in found if _is_complete(name, found)]
        wanted = [name for name in whole if not (self.shared and _is_below(name, CHECKPOINTS))]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.remote.take(self.folder, wanted)
        self._sent = {name: _state(self.folder / name) for name in wanted}
        self._seen = {name: found[name].version for name in wanted}
        if self._leads:
            self.remote.remove(sorted(found.keys() - set(whole)))
            self.remote.write(SIGNATURE, self._signature.encode())

    def push(self) -> None:
        """Sends what has changed here, and removes what is gone.

        Raises:
          UserError: that fails, or another run has started to work there.
        """
        with self._lock:
            self._check_signature()
            found = {name: _state(self.folder / name) for name in self._local_names()}
            changed = [name for name, state in found.items() if self._sent.get(name) != state]
            for part in _in_turns(changed):
                large = [name for name in part if _is_listed(name) and not _is_list(name)]
                self.remote.send(self.folder, large)
                self.remote.send_growing(self.folder, sorted(set(part) - set(large)))
                self._sent |= {name: found[name] for name in part}
                self._own |= set(part)
            if self._leads:
                gone = sorted(self._sent.keys() - found.keys(), key=lambda name: not _is_list(name))
                for name in gone:  # a list first: what has none is no checkpoint
                    self.remote.remove([name])
                    del self._sent[name]

    def take_new(self) -> None:
        """Takes what other hosts have sent, and removes here what is gone there. Raises UserError where that fails."""
        with self._lock:
            found = {name: entry for name, entry in self._entries().items() if not _is_below(name, CHECKPOINTS)}
            theirs = {name: entry.version for name, entry in found.items() if name not in self._own}
            fresh = [name for name, version in theirs.items() if self._seen.get(name) != version]
            self.remote.take(self.folder, fresh)
            for name in self._seen.keys() - theirs.keys() - self._own:
                (self.folder / name).unlink(missing_ok=True)
                self._sent.pop(name, None)
            self._sent |= {name: _state(self.folder / name) for name in fresh}
            self._seen = theirs

    def _entries(self) -> dict[str, Entry]:
        return {name: entry for name, entry in self.remote.entries().items() if name != SIGNATURE}

    def _check_signature(self):
        if not self._leads:
            return
        found = self.remote.read(SIGNATURE).decode(errors="replace")
        if found != self._signature:
            raise UserError(
                f"another run works on {self.url} since this one has begun ({printable(found)}): this one ends, and "
                "what it has made after its last checkpoint is not sent; give each run a --workdir of its own"
            )

    def _local_names(self) -> list[str]:
        paths = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        unfinished = lambda path: any(fnmatch.fnmatch(part, one) for part in path.parts for one in UNFINISHED)
        return sorted(path.as_posix() for path in paths if not unfinished(path))


def _held(path: pathlib.Path, url: str) -> Any:
    """A file that is locked until this process ends. Raises UserError where another one has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process of this machine works on {url}; wait for it, or end it first") from None
    return file


def _is_below(name: str, folder: str) -> bool:
    return folder in name.split("/")[:-1]


def _is_listed(name: str) -> bool:
    return any(_is_below(name, folder) for folder in LISTED)


def _is_list(name: str) -> bool:
    return name.rpartition("/")[2] == file_lists.FILE_NAME


def _is_complete(name: str, names: Collection[str]) -> bool:
    """Whether a file is needed: those of a checkpoint or a model are where its list is too."""
    parts = name.split("/")
    places = [i for i, part in enumerate(parts[:-1]) if part in LISTED]
    if not places:
        return True
    end = places[0] + (2 if parts[places[0]] == CHECKPOINTS else 1)
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
