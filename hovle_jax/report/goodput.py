"""Where the wall-clock time of a run goes. Goodput is the share that went into steps that count.

From the start of a run, every second of a process belongs to one of `ACTIVITIES`. The sums are kept in RUN/time.json,
so a resumed run adds to them. Time in which no process works on the run does not count.

  start        loading data, tokenizer, parameters and the newest checkpoint, before the first step
  compile      the first step of a process, from its call to its end
  training     the other steps, and writing their metrics
  data         waiting for a batch while the devices are idle
  evaluation   held-out metrics between steps
  checkpoints  saving, as far as steps wait for it; at the end all of it, and writing the finished model
  profile      starting and writing a trace, with --profile
  lost         training after the checkpoint that a run was resumed from: these steps had to be repeated

The definition is Google's ML Goodput: productive step time / total time (github.com/AI-Hypercomputer/
ml-goodput-measurement), where the first step of a process, data loading, checkpoints and repeated steps are badput.
"""

import contextlib
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from hovle_jax.system.files import read_json, write_json
from hovle_jax.system.progress import format_duration

if TYPE_CHECKING:
    import jax

FILE_NAME = "time.json"
ACTIVITIES = ("start", "compile", "training", "data", "evaluation", "checkpoints", "profile", "lost")
Seconds: TypeAlias = dict[str, float]  # by activity


class TimeSheet:
    """Adds up seconds by activity. One activity is always current, at first 'start'.

    Attributes:
      clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._seconds: Seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity = "start"
        self._since = clock()

    def enter(self, activity: str) -> str:
        """Makes an activity the current one -> the one before."""
        now, before = self.clock(), self._activity
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    @contextlib.contextmanager
    def spent(self, activity: str) -> Iterator[None]:
        """Makes an activity the current one inside the block; afterwards the one before is current again."""
        before = self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, activity: str) -> None:
        """Moves seconds from the current activity to another one."""
        self._seconds[self._activity] -= seconds
        self._seconds[activity] += seconds

    def add(self, seconds: Seconds) -> None:
        """Adds {activity: seconds} of earlier processes."""
        for activity, value in seconds.items():
            self._seconds[activity] += value

    def seconds(self) -> Seconds:
        """{activity: seconds} until now."""
        self.enter(self._activity)
        return dict(self._seconds)


def goodput(seconds: Seconds) -> float:
    """The share of training in {activity: seconds}."""
    return seconds["training"] / max(sum(seconds.values()), 1e-9)


def summary(seconds: Seconds) -> str:
    """'93.1% goodput; training 0:12:30 (93.1%), compile ...', the longest first, without what took no time."""
    return f"{100 * goodput(seconds):.1f}% goodput; " + ", ".join(
        f"{activity} {text}" for activity, text in shares(seconds).items()
    )


def shares(seconds: Seconds) -> dict[str, str]:
    """{activity: '0:12:30 (93.1%)'}, the longest first, without what took no time."""
    total = max(sum(seconds.values()), 1e-9)
    spent = sorted(((value, activity) for activity, value in seconds.items() if value > 0), reverse=True)
    return {activity: f"{format_duration(value)} ({100 * value / total:.1f}%)" for value, activity in spent}


# ---------------------------------------------------------------------------------------------------------------------
# Kept in the run's folder


def write_time(folder: str | os.PathLike, step: int, seconds: Seconds) -> None:
    """Replaces `folder/time.json`: the seconds of the run up to a step, over all its processes."""
    # Written with every line of the run: it need not wait for the disk.
    write_json(pathlib.Path(folder) / FILE_NAME, {"step": step, "seconds": seconds}, synced=False)


def read_time(folder: str | os.PathLike) -> tuple[int, Seconds]:
    """-> (step, {activity: seconds}) as `write_time` wrote them; (0, {}) without the file."""
    path = pathlib.Path(folder) / FILE_NAME
    if not path.is_file():
        return 0, {}
    noted = read_json(path, ["step", "seconds"], "remove it: the time of the run then counts from here")
    return noted["step"], noted["seconds"]


def earlier_time(folder: str | os.PathLike, resume_step: int) -> Seconds:
    """{activity: seconds} of the processes before this one.

    Training after the checkpoint is lost. It is estimated by its share of the steps, as steps take about the same time.
    What a killed process did after its last metrics line is not known, and not counted.

    Args:
      resume_step: the step of the checkpoint that the run continues from; 0 = from the beginning.
    """
    step, seconds = read_time(folder)
    if step <= resume_step or not seconds:
        return seconds
    lost = seconds["training"] * (step - resume_step) / step
    return seconds | {"training": seconds["training"] - lost, "lost": seconds["lost"] + lost}


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for data


class StepWatch:
    """Records in its own thread when steps end on the devices, so that the loop never waits for them.

    A loop that runs ahead of the devices may wait for data while they still have steps to run. Only the wait after the
    end of the last of these is lost time. A context manager.

    Attributes:
      clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._dispatched = 0
        self._ended = (0, clock())  # how many have ended, and when the last one did
        self._steps: "queue.SimpleQueue[jax.Array | None]" = queue.SimpleQueue()

    def __enter__(self) -> "StepWatch":
        threading.Thread(target=self._note_ends, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._steps.put(None)  # not joined: where a host has failed, a step on the others may never end

    def dispatched(self, result: "jax.Array") -> None:
        """Tells of a step that was dispatched, by one of its results."""
        self._dispatched += 1
        self._steps.put(result)

    def ended(self) -> tuple[int, float]:
        """-> (how many steps have ended, when the last one did)."""
        return self._ended

    def idle_since(self) -> float | None:
        """When the devices ended the last dispatched step; None while they are busy."""
        count, moment = self._ended
        return moment if count == self._dispatched else None

    def _note_ends(self):
        count = 0
        while (result := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # the loop reads the same result, and raises its error
                result.block_until_ready()
            count += 1
            self._ended = count, self._clock()


def wait_time(asked: float, given: float, idle_since: float | None) -> float:
    """Seconds of a wait for data, from `asked` to `given`, in which the devices were idle."""
    return 0.0 if idle_since is None else max(0.0, given - max(asked, idle_since))
