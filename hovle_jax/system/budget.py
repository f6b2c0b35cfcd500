"""A budget of memory that threads share: each waits until there is room for what it will take."""

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """So many bytes for all threads of this process together.

    What is larger than the whole budget is let in when nothing else is: it does not wait for ever. A thread takes its
    share once, with nothing in hand, so that no two wait for each other.
    """

    def __init__(self, total: int):
        self.total = total
        self._used, self._freed = 0, threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """So many bytes are taken within."""
        share = min(size, self.total)
        with self._freed:
            self._freed.wait_for(lambda: self._used + share <= self.total)
            self._used += share
        try:
            yield
        finally:
            with self._freed:
                self._used -= share
                self._freed.notify_all()
