"""Processes that this one starts: they end with it, and how they ended is said in words."""

import ctypes
import os
import pathlib
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)
STATES = {"T": "stopped", "t": "stopped", "D": "waiting for a disk", "Z": "ended", "S": "waiting", "R": "computing"}


def end_with_parent(parent: int) -> None:
    """Ends this process as soon as the thread that started it has ended, however that came about (Linux).

    Args:
      parent: its process id, as that process knew it: it may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def how_it_ended(exit_code: int | None) -> str:
    """An exit code of `multiprocessing` in words: 'killed by signal 9 (SIGKILL): out of memory?'."""
    if exit_code is None:
        return "cut off"
    if exit_code >= 0:
        return f"ended with status {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "unknown"
    guess = {"SIGKILL": ": out of memory?", "SIGBUS": ": out of shared memory, or a file that shrank?"}.get(name, "")
    return f"killed by signal {-exit_code} ({name}){guess}"


def state_of(pid: int) -> str:
    """What Linux says that a process does: 'stopped', 'waiting'; 'unknown' elsewhere."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return STATES.get(fields[0], "unknown")
