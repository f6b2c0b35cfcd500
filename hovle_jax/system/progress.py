"""Lines that report how far a long task is, and when it will be done."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_SIGNS = 10.0  # of a task whose progress is unknown


def track(
    items: Iterable[T],
    say: Callable[[str], None],
    name: str,
    unit: str,
    total: int,
    size: Callable[[T], int] = lambda item: 1,
    clock: Callable[[], float] = time.monotonic,
    before: int = 0,
) -> Iterator[T]:
    """Passes items on, and reports progress every few seconds.

    Args:
      say: called with a line: "NAME: 2,048 of 20,000 UNIT 10%  0:01:35 left".
      total: the sum of the sizes of all items.
      size: of an item, in units.
      clock: returns seconds from any origin.
      before: of the first so many units is known that they take no time.
    """
    done, start = 0, clock()
    last = start
    for item in items:
        yield item
        done += size(item)
        now = clock()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = format_duration((now - start) / max(1, done - before) * (total - done))
            say(f"{name}: {done:,} of {total:,} {unit} {done / total:>4.0%}  {left} left")


def format_duration(seconds: float) -> str:
    """H:MM:SS, always with the hour, so that 0:41 is never read as hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextlib.contextmanager
def waiting(name: str, say: Callable[[str], None], every: float = SECONDS_BETWEEN_SIGNS) -> Iterator[None]:
    """Reports that a task begins, every few seconds how long it has taken so far, and at the end how long it took.

    For a task whose progress is unknown, such as a compilation. A thread prints the lines in between.

    Args:
      say: called with a line: "NAME ...", "NAME: 0:00:20 so far", "NAME: done in 0:00:31".
      every: seconds between lines.
    """
    start, ended = time.monotonic(), threading.Event()
    passed = lambda: format_duration(time.monotonic() - start)

    def report():
        while not ended.wait(every):
            say(f"{name}: {passed()} so far")

    say(f"{name} ...")
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
        say(f"{name}: done in {passed()}")
    finally:
        ended.set()
        reporter.join()
