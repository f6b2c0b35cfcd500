"""A lock on a folder, so that two processes never write one run.

FOLDER/.lock is locked by `flock`, which the system gives up when its process dies. Some file systems (mounted buckets)
keep such a lock on their own machine. So the file also names its holder, who writes a new count into it every
BEAT_SECONDS: a name from another machine counts until its count has stood still for STALE_SECONDS. Clocks are not
compared.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hovle_jax.errors import UserError

FILE_NAME = ".lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 40.0
LINE_BYTES = 400


@contextlib.contextmanager
def locked(folder: str | os.PathLike, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the folder's lock within the block; the lock of a process that is gone is taken over.

    Args:
      say: takes a line where it must wait to see whether another machine's process is gone.
    Raises:
      UserError: another process holds it; the message names it.
    """
    path = pathlib.Path(folder) / FILE_NAME
    file = path.open("a+b")
    try:
        if not _flock(file):
            raise UserError(_refusal(path, _read(path)))
        holder = _read(path)
        if holder and not _is_gone(holder):
            say(f"{path} names {_name(holder)}: waiting {STALE_SECONDS:g} s to see whether it is gone")
            _wait_until_stale(path, holder)
        with _Held(path):
            yield
    finally:
        file.close()


class _Held:
    """The holder's name in the file, kept fresh by a thread; the file is emptied at the end."""

    def __init__(self, path):
        self._path, self._token, self._ended = path, secrets.token_hex(8), threading.Event()
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "time": started, "token": self._token}
        self._own |= {"process": _process_mark(os.getpid())}

    def __enter__(self):
        self._write(0)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused):
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.write_bytes(b"")

    def _write(self, count):
        # In place: a new file in its stead would not have the flock. Of one length: the file is never empty meanwhile.
        line = json.dumps(self._own | {"beat": count}).ljust(LINE_BYTES) + "\n"
        with self._path.open("r+b", buffering=0) as file:
            file.write(line.encode())
            file.truncate()

    def _beat(self):
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a folder that is away for a moment; the other's patience is longer
                holder = _read(self._path)
                if holder and holder.get("token") != self._token:
                    _give_way(self._path, holder)
                self._write(count := count + 1)


def _give_way(path, holder):
    """This process was frozen for so long that another one has taken over: two must not write."""
    print(f"error: {_refusal(path, holder)}", file=sys.stderr, flush=True)
    os._exit(1)


def _flock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without it: the name alone must do
        return True
    return True


def _read(path) -> dict[str, Any]:
    """The holder; {} where there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_gone(holder):
    """Whether the holder is a process of this machine that has ended; its number may be another's now."""
    if holder.get("host") != socket.gethostname():
        return False
    return _process_mark(holder.get("pid")) != holder.get("process") or holder.get("process") is None


def _process_mark(pid):
    """What tells a process from a later one of its number: the boot and its start; None without such a process."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return f"{boot}/{stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _wait_until_stale(path, holder):
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(0.5, STALE_SECONDS / 10))
        now = _read(path)
        if not now:
            return
        if now != holder:
            raise UserError(_refusal(path, now))


def _name(holder):
    if not holder:
        return "a process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('time')})"


def _refusal(path, holder):
    return (
        f"{path.parent} is in use by {_name(holder)}: two would mix what they write; wait for it, end it, or choose "
        "another folder (--workdir, --index)"
    )
