"""Where the wall-clock time of a run goes. Goodput is the share of it that went into steps that count.

Every second of a process from the call of the run on belongs to one of `ACTIVITIES`. The sums are kept in
RUN/time.json, so that a run that is resumed goes on adding; time in which no process works on it is not in them.

  start        data, tokenizer, parameters, the newest checkpoint: what comes before the first step
  compile      the first step of a process, from its call to its end
  training     the other steps, with writing their metrics
  data         waiting for a batch while the devices have nothing to do
  evaluation   held-out metrics in between
  checkpoints  the part of saving that steps wait for; at the end all of it, and the finished model
  profile      starting and writing a trace that was asked for
  lost         training behind the checkpoint that a run was resumed from: these steps were done again

The definition is that of Google's ML Goodput: productive step time / total time (github.com/AI-Hypercomputer/
ml-goodput-measurement), where the first step of a process, data loading, checkpoints and repeated steps are badput.
"""

import contextlib
import json
import os
import pathlib
import queue
import threading
import time

from hovle_jax.system.progress import format_duration

FILE_NAME = "time.json"
ACTIVITIES = ("start", "compile", "training", "data", "evaluation", "checkpoints", "profile", "lost")


class TimeSheet:
    """Adds up seconds by activity; always in one of them, at first in 'start'.

    Attributes:
      clock: seconds, from any origin.
    """

    def __init__(self, clock=time.monotonic):
        self.clock = clock
        self._seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity: str = "start"
        self._since = clock()

    def enter(self, activity):
        """From here on time is spent on this; -> what it was spent on before."""
        now, before = self.clock(), self._activity
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    @contextlib.contextmanager
    def spent(self, activity):
        """Time within is spent on this, and afterwards on what it was spent on before."""
        before = self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds, activity):
        """Seconds of what time is spent on now were spent on this instead."""
        self._seconds[self._activity] -= seconds
        self._seconds[activity] += seconds

    def add(self, seconds):
        """Adds {activity: seconds} of earlier processes."""
        for activity, value in seconds.items():
            self._seconds[activity] += value

    def seconds(self):
        """{activity: seconds} until now."""
        self.enter(self._activity)
        return dict(self._seconds)


def goodput(seconds):
    """The share of {activity: seconds} that was training."""
    return seconds["training"] / max(sum(seconds.values()), 1e-9)


def describe(seconds):
    """'93.1% goodput; training 0:12:30 (93.1%), compile ...', the longest first; what took no time is left out."""
    return f"{100 * goodput(seconds):.1f}% goodput; " + ", ".join(
        f"{activity} {text}" for activity, text in shares(seconds).items()
    )


def shares(seconds):
    """{activity: '0:12:30 (93.1%)'}, the longest first, without what took no time."""
    total = max(sum(seconds.values()), 1e-9)
    spent = sorted(((value, activity) for activity, value in seconds.items() if value > 0), reverse=True)
    return {activity: f"{format_duration(value)} ({100 * value / total:.1f}%)" for value, activity in spent}


# ---------------------------------------------------------------------------------------------------------------------
# Kept in the run's folder


def write_time(folder, step, seconds):
    """Replaces `folder/time.json`: the seconds of the run until a step, over all its processes."""
    path = pathlib.Path(folder) / FILE_NAME
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps({"step": step, "seconds": seconds}, indent=2) + "\n")
    os.replace(fresh, path)


def read_time(folder):
    """-> (step, {activity: seconds}) as `write_time` left them; (0, {}) without the file."""
    path = pathlib.Path(folder) / FILE_NAME
    if not path.is_file():
        return 0, {}
    noted = json.loads(path.read_text())
    return noted["step"], noted["seconds"]


def earlier_time(folder, resume_step):
    """{activity: seconds} of the processes before this one.

    Training behind the checkpoint is lost. It is its share of the steps, as steps take about the same time; what came
    behind the last line of a killed process is known to nobody, and counted by nobody.

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
    """Notes when steps end on the devices, in a thread of its own, so that the loop never waits for them.

    A loop that runs ahead of the devices may wait for data as long as they have steps to do. Only what it waits beyond
    the end of the last of these is lost. A context manager.

    Attributes:
      clock: seconds, from any origin.
    """

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._dispatched = 0
        self._ended = (0, clock())  # how many, and when the last of them did
        self._steps = queue.SimpleQueue()

    def __enter__(self):
        threading.Thread(target=self._note_ends, daemon=True).start()
        return self

    def __exit__(self, *unused):
        self._steps.put(None)  # without waiting: where a host has failed, a step on the others may never end

    def dispatched(self, result):
        """A step is on its way, of which this is a result."""
        self._dispatched += 1
        self._steps.put(result)

    def idle_since(self):
        """When the devices had done all steps; None while they have any to do."""
        count, moment = self._ended
        return moment if count == self._dispatched else None

    def _note_ends(self):
        count = 0
        while (result := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # the loop reads the same result, and raises
                result.block_until_ready()
            count += 1
            self._ended = count, self._clock()


def wait_time(asked, given, idle_since):
    """Seconds of a wait for data, from `asked` to `given`, in which the devices had nothing to do."""
    return 0.0 if idle_since is None else max(0.0, given - max(asked, idle_since))
