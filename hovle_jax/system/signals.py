"""Signals that ask a process to end, heard at once, whatever its main thread does.

Python runs a handler in the main thread, between two of its instructions: a process that compiles for ten minutes would
hear of SIGTERM after them. So the signal's number goes through a pipe, into which the handler in C writes it, to a
thread that waits there.
"""

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator

# By number; a shell gives 128 + the number as the status of a process that a signal has ended.
ASKING = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}
_END = b"\0"  # there is no signal 0
_hearing = False


@contextlib.contextmanager
def heard(tell: Callable[[int], None]) -> Iterator[None]:
    """Within the block the signals of ASKING do nothing but call `tell(number)`, in a thread. For the main thread.

    A signal that the process was started to ignore (as by nohup) stays ignored.
    """
    global _hearing
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = {number: signal.getsignal(number) for number in ASKING}
    earlier = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(ear, tell), daemon=True)
    listener.start()
    _hearing = True
    keep_hearing()
    try:
        yield
    finally:
        _hearing = False
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(mouth, _END)
        listener.join()
        os.close(ear)
        os.close(mouth)


def keep_hearing() -> None:
    """Takes the signals back from libraries that have handlers of their own, as those of devices do when they start.

    Nothing outside of `heard`. For the main thread.
    """
    for number in ASKING if _hearing else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)


def leave_terminal() -> None:
    """What is printed after a terminal has gone is lost, instead of being an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not os.isatty(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _nothing(number, frame):
    """A handler, so that the signal is not deadly; `_listen` answers it."""


def _listen(ear, tell):
    while (numbers := os.read(ear, 64)) != _END:
        for number in numbers:
            if number in ASKING:
                tell(number)
