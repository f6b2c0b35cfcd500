"""Preemption: who asks a run to end, what is saved before it does, and with which status it ends.

SIGTERM, Ctrl-C, SIGHUP and the cloud's notice of maintenance are answered alike. While steps are made, all hosts save
after the same step and end with the signal's status: all is saved, start again. Elsewhere (loading, compiling,
scoring), and at a second signal, the process ends at once; the newest checkpoint stays as it is, and the status is
ENDED_UNSAVED unless nothing was left to save.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Iterator

import jax

from hovle_jax.hosts import distributed, maintenance
from hovle_jax.system import signals

ENDED_UNSAVED = 75  # EX_TEMPFAIL of sysexits.h: try again
GO_ON = "the same command goes on from the newest checkpoint, or from the beginning where there is none"
REPORT = "the model is written; the same command goes on with its report"
JOIN_SECONDS = 10
REQUESTED = "hovle_jax/requested"  # key in the store: the first request to end, of any host


@dataclasses.dataclass(frozen=True)
class Request:
    """Somebody wants the run to end.

    Attributes:
      by: as the user knows it.
      status: of the process, once all is saved.
    """

    by: str
    status: int


class _Answering:
    """What this process makes of requests; its methods are called in threads."""

    def __init__(self):
        self.lock = threading.Lock()
        self.request: Request | None = None
        self.steps = False  # whether steps are made and there is something to save
        self.saved, self.go_on = False, GO_ON
        self.calls, self.last_call = 0, None  # of `preempted`; the one at which all hosts save

    def notes(self, request):
        """Whether the request is answered by a save; False: steps are not made, or it is the second one."""
        with self.lock:
            if not self.steps or self.request is not None:
                return False
            self.request = request
            return True

    def agree(self):
        """Waits for a request on any host, then for the number of the call of `preempted` that none has passed."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run ends
            asked = json.loads(distributed._client().blocking_key_value_get(REQUESTED, distributed.WAIT_MS))
            if asked is None:  # the run has ended without one
                return
            with self.lock:  # no host makes a further step meanwhile
                self.request = self.request or Request(**asked)
                self.last_call = 1 + max(distributed.gather("steps", self.calls))


_answering = _Answering()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Requests to end are answered within the block. For the main thread."""
    global _answering
    _answering = _Answering()
    with signals.heard(_hear), maintenance.noticed(_notice):
        yield


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """A request to one host is one to all within the block, which begins once jax.distributed has started."""
    if not distributed.several():
        yield
        return
    agreement = threading.Thread(target=_answering.agree, daemon=True)
    agreement.start()
    yield
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there was a request
        distributed._client().key_value_set(REQUESTED, "null")
    agreement.join(JOIN_SECONDS)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Steps are made within, and `preempted` is asked after each: a first request is answered by a save.

    Until the first step of the process is done, which compiles for minutes, there is nothing to save.
    """
    if threading.current_thread() is threading.main_thread():
        signals.keep_hearing()
    _answering.saved = False
    try:
        yield
    finally:
        with _answering.lock:
            _answering.steps = False
    _answering.saved = True


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Within the block nothing can be lost: the run is finished, and its report can be made again."""
    _answering.saved, _answering.go_on = True, REPORT
    try:
        yield
    finally:
        _answering.saved, _answering.go_on = False, GO_ON


def preempted() -> bool:
    """Whether all hosts must save and stop now, because one of them was asked to end.

    Call it on all hosts after every step: they agree on one that none of them has passed.
    """
    _answering.steps = True
    if not distributed.several():
        return _answering.request is not None
    with _answering.lock:
        _answering.calls += 1
        return _answering.last_call is not None and _answering.calls >= _answering.last_call


def request() -> Request | None:
    """Who asked the run to end while steps were made, on any host; to be called on all of them."""
    own = _answering.request
    found = [one for one in distributed.gather("request", own and dataclasses.asdict(own)) if one]
    return Request(**found[0]) if found else None


def _hear(number):
    by = signals.ASKING[signal.Signals(number)]
    asked = Request(by, 128 + number)
    if number == signal.SIGHUP:
        signals.leave_terminal()
    if not _answering.notes(asked):
        status = asked.status if _answering.saved else ENDED_UNSAVED
        distributed.end_all(f"{by}: ended at once; {_answering.go_on}", status)
    _say(f"{by}: saving after this step, then ending; a second signal ends at once, without")
    _tell(asked)


def _notice(text):
    """Notices come early: a run that makes no steps yet answers with its first one."""
    with _answering.lock:
        if _answering.request is not None:
            return
        asked = _answering.request = Request(f"the machine's notice {text}", 128 + signal.SIGTERM)
    _say(f"{asked.by}: saving after this step, then ending")
    _tell(asked)


def _tell(asked):
    if distributed.several():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was faster
            distributed._client().key_value_set(REQUESTED, json.dumps(dataclasses.asdict(asked)))


def _say(line):
    with contextlib.suppress(OSError):  # a terminal that has gone
        print(line, file=sys.stderr, flush=True)
