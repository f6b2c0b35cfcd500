"""One line about a process that dies without one, and what its libraries print in a file.

Where a host of a run is lost, the libraries of the others end their processes from threads of their own, with dozens of
lines and no chance for Python to say why. So file descriptor 2, where such text goes, becomes a file, Python's own
errors keep the terminal, and a shell that waits for the end of a pipe has the last word.
"""

import contextlib
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

# $0 is the line. The shell outlives signals to the whole group, and ends with this process in any case.
_WAIT = 'trap "" TERM INT HUP; read -r said || printf "%s\\n" "$0" >&2'


class LastWord:
    """A process's last line, and the file of its traces.

    Attributes:
      path: of the file; removed at the end where it is empty.
    """

    def __init__(self, path: pathlib.Path, line: str):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        sys.stderr.flush()
        terminal = os.dup(2)
        self._shell = subprocess.Popen(["sh", "-c", _WAIT, line], stdin=subprocess.PIPE, stderr=terminal)
        self._stderr, self._terminal = sys.stderr, os.fdopen(terminal, "w", buffering=1)
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 2)
        os.close(file)
        _point_stderr_at(self._terminal)

    def spoken(self) -> None:
        """The process has said itself how it ends."""
        assert self._shell.stdin
        with contextlib.suppress(OSError):  # said before
            self._shell.stdin.write(b"\n")
            self._shell.stdin.close()
            self._shell.wait()
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.path.unlink()
                self.path.parent.rmdir()

    def end(self) -> None:
        """`spoken`, and stderr is as it was."""
        self.spoken()
        os.dup2(self._terminal.fileno(), 2)
        _point_stderr_at(self._stderr)
        self._terminal.close()


def _point_stderr_at(stream):
    """Also for handlers of logging, which keep the stream that they were made with."""
    handlers = [*logging.root.handlers, absl_logging.get_absl_handler().python_handler]
    before, sys.stderr = sys.stderr, stream
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(stream)


@contextlib.contextmanager
def last_word(path: pathlib.Path, line: str) -> Iterator[LastWord | None]:
    """A LastWord within the block; None where its file cannot be written."""
    try:
        word = LastWord(path, line)
    except OSError:
        yield None
        return
    try:
        yield word
    finally:
        word.end()
