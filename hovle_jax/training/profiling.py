"""Profile traces on request: what the host and the devices do in some steps of a run."""

import jax

from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed

FOLDER = "profile"


def parse_steps(text: str) -> range | None:
    """'10:15' -> range(10, 15), the steps that are counted from 0; '' -> None. Raises UserError for anything else."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile={text!r} is not FIRST:LAST with 0 <= FIRST < LAST: 10:15 traces steps 10 to 14")
    return range(int(first), int(last))


def check_steps(steps: range | None, first_step: int, last_step: int) -> None:
    """Raises UserError where a run from `first_step` to before `last_step` does not make all of these steps."""
    if steps and not (first_step <= steps.start and steps.stop <= last_step):
        raise UserError(
            f"--profile={steps.start}:{steps.stop} is not inside the steps that this run makes, "
            f"{first_step}:{last_step}"
        )


class Profile:
    """A trace of some steps into RUN/profile, on the first host; a context manager around the loop.

    Attributes:
      steps: a range, or None = no trace.
      folder: the run's own.
      besides: `Monitor.besides`: waits for the steps on their way, and puts the time down to an activity. So the trace
        has the named steps, whole, and none before them.
      say: takes the line that says where the trace is.
    """

    def __init__(self, steps, folder, besides, say):
        self._steps = steps if distributed.is_leader() else None
        self._folder, self._besides, self._say = folder / FOLDER, besides, say
        self._running = False

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self._running:  # the run ends within the traced steps
            self._stop()

    def before(self, step: int) -> None:
        if self._steps and step == self._steps.start:
            with self._besides("profile"):
                jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int) -> None:
        """A step was dispatched: the trace ends when the last one has."""
        if self._running and step + 1 == self._steps.stop:
            with self._besides("profile"):
                self._stop()
            self._say(
                f"a trace of steps {self._steps.start} to {self._steps.stop - 1} is in {self._folder}: look at it with "
                f"`xprof --logdir {self._folder}` (pip install xprof), or open its .trace.json.gz in ui.perfetto.dev"
            )

    def _stop(self):
        self._running = False
        jax.profiler.stop_trace()
