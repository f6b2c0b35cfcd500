"""Notices that a run stands still, and writes down where its threads are.

Where a collective waits for a device that does not answer, no Python error is ever raised, and the only hint is the
stack of each host.
"""

import contextlib
import faulthandler
import math
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

TIMES_USUAL = 10  # a step that takes so many times the usual one may be stuck
LOOKS = 10  # in the time after which it is said
STUCK = 1  # the status of a process that ends for it


class Watchdog:
    """Looks now and then, in a thread of its own, when the last step has ended; a context manager.

    Before the first step of a process (which compiles), and besides the steps, nothing is expected.

    Attributes:
      ended: gives (steps of this process that have ended, when the last one did, by the clock).
      seconds: without the end of a step after which stacks are written, if they are TIMES_USUAL times the usual too;
        0 = never.
      path: where to: RUN/stacks-HOST.txt.
      say: takes a line.
      stop: called afterwards, with that line; None = the run goes on waiting.
      clock: seconds, from any origin.
    """

    def __init__(
        self,
        ended: Callable[[], tuple[int, float]],
        seconds: float,
        path: pathlib.Path,
        say: Callable[[str], object],
        stop: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ended, self._seconds, self._path = ended, seconds, path
        self._say, self._stop, self._clock = say, stop, clock
        self._resumed, self._paused = clock(), 0
        self._count, self._moment, self._usual = 0, math.nan, 0.0
        self._told_at = -1  # the number of steps at which it was last said
        self._leaving = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._leaving.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no step is expected: an evaluation, a save."""
        self._paused += 1
        try:
            yield
        finally:
            self._resumed = self._clock()
            self._paused -= 1

    def look(self) -> None:
        """One look."""
        count, moment = self._ended()
        if count != self._count:
            if self._count and moment > self._moment >= self._resumed:
                self._usual = max(self._usual / 2, (moment - self._moment) / (count - self._count))
            self._count, self._moment = count, moment
        quiet = self._clock() - max(moment, self._resumed)
        waits = count == 0 or self._paused or count == self._told_at
        if not waits and quiet > max(self._seconds, TIMES_USUAL * self._usual):
            self._told_at = count
            self._tell(quiet)

    def _watch(self):
        while not self._leaving.wait(self._seconds / LOOKS):
            self.look()

    def _tell(self, quiet):
        usual = f", which usually takes {self._usual:.2g} s" if self._usual else ""
        line = f"no step has ended for {quiet:.0f} s{usual}; the stacks of all threads are in {self._path}"
        try:
            self._path.write_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n\n{stacks()}")
        except OSError as error:
            line = f"{line.partition(';')[0]}; stacks cannot be written to {self._path} ({error.strerror})"
        self._say(line)
        if self._stop:
            self._stop(line)


def stacks() -> str:
    """Where every thread of this process stands, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
