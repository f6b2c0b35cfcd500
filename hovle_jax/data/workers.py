"""Rows made by processes, in order, whatever happens to a process.

Row k is made by process k modulo their number. A row is a function of its number, so a process that was killed or hangs
is started again and asked for the same rows; nobody sees a difference.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import cloudpickle

from hovle_jax.errors import UserError
from hovle_jax.system.command_line import warn
from hovle_jax.system.processes import end_with_parent, how_it_ended, state_of

STARTS = 3  # in a row that may fail: then the rows are to blame, or the machine
SECONDS_TO_END = 5.0


def made_by_processes(rows: Any, first: int, count: int, ahead: int, timeout: float = 0.0) -> Iterator[Any]:
    """Rows `first`, `first + 1`, ... without end.

    Args:
      rows: gives a row for its number, `rows[k]`, and can be pickled.
      count: processes.
      ahead: rows that are asked for in advance.
      timeout: seconds that a row may take before its process counts as hanging; 0 = any time.
    Raises:
      UserError: making a row raised one, or a process failed several times at the same rows.
    """
    pickled = cloudpickle.dumps(rows)
    workers = [_Worker(pickled, number, timeout) for number in range(count)]
    asked = first
    try:
        for index in itertools.count(first):
            for asked in range(asked, index + max(ahead, count)):
                workers[asked % count].ask(asked)
            asked = index + max(ahead, count)
            for worker in workers:
                worker.mend()
            yield workers[index % count].take(index)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and a thread that receives what it makes."""

    def __init__(self, rows: bytes, number: int, timeout: float):
        self._rows, self._number, self._timeout = rows, number, timeout
        self._changed = threading.Condition()
        self._asked, self._made = [], {}
        self._failures = 0  # since the last row that was made
        self._start()

    def ask(self, index):
        self._asked.append(index)
        self._send(index)

    def take(self, index):
        """The row, as soon as it is made."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: index in self._made or self._lost, self._timeout or None)
                if index in self._made:
                    self._asked.remove(index)
                    return _unpacked(self._made.pop(index))
            self._restart()

    def mend(self):
        """Starts it again if it has ended, so that it is at work before its rows are needed."""
        if self._lost and self._failures < STARTS - 1:
            self._restart()

    def end(self):
        self._process.kill()
        self._process.join(SECONDS_TO_END)

    def _start(self):
        context = multiprocessing.get_context("spawn")  # this process has threads, which a fork would break
        ours, theirs = context.Pipe()
        name = f"data worker {self._number}"
        self._process = context.Process(target=_work, args=(self._rows, theirs, os.getpid()), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self._lost, self._connection = False, ours
        threading.Thread(target=self._receive, args=(ours, self._process), daemon=True).start()
        for index in self._asked:
            if index not in self._made:
                self._send(index)

    def _restart(self):
        with self._changed:
            self._failures += 1
            process, lost, rows = self._process, self._lost, [i for i in self._asked if i not in self._made]
        if lost:
            process.join(SECONDS_TO_END)
            problem = f"was {how_it_ended(process.exitcode)}".replace("was ended", "ended")
        else:
            problem = f"has not made a row for {self._timeout:g} seconds and is {state_of(process.pid or 0)}"
        what = f"{process.name} (process {process.pid}) {problem}"
        self.end()
        if self._failures >= STARTS:
            raise UserError(
                f"{what}, {STARTS} times at the same rows (from row {rows[0]} of this host's); take fewer workers if "
                "memory is short, or set workers=0: an error of the row's own then shows"
            )
        warn(f"{what}; it is started again and makes the same rows")
        self._start()

    def _send(self, index):
        with contextlib.suppress(OSError):  # it has ended, which `take` sees
            self._connection.send(index)

    def _receive(self, connection, process):
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                index, answer = connection.recv()
                with self._changed:
                    self._made[index], self._failures = answer, 0
                    self._changed.notify_all()
        with self._changed:
            if process is self._process:
                self._lost = True
                self._changed.notify_all()


def _unpacked(answer):
    row, message, trace = answer
    if message is not None:
        raise UserError(message)
    if trace is not None:
        raise RuntimeError(f"a data worker failed:\n{trace}")
    return row


def _work(rows: bytes, connection: Any, parent: int) -> None:
    """The life of a process: it makes the rows that it is asked for."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal; the parent says what follows
    made_of = cloudpickle.loads(rows)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            index = connection.recv()
            connection.send((index, _answer(made_of, index)))


def _answer(rows, index):
    """(row, a UserError's message, any other error's trace), of which one is not None."""
    try:
        return rows[index], None, None
    except UserError as error:
        return None, str(error), None
    except Exception:  # noqa: BLE001 (raised in the parent)
        return None, None, traceback.format_exc()
