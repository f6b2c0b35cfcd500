"""The line that a training run prints as it goes."""

import numbers
import time
from collections.abc import Callable, Mapping

from hovle_jax.system.progress import format_duration

SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Progress:
    """Formats a run's progress.

    Speed and time left are measured over the steps of this process after its first one, which also compiles: call
    `started` when the first step has ended.

    Attributes:
      stage: the name at the start of the line.
      total_steps: the step at which the run ends.
      first_step: steps done before this process (the checkpoint's step; 0 for a new run).
      tokens_per_step: tokens of a global batch; 0 leaves the speed out.
      clock: seconds, from any origin.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        first_step: int,
        tokens_per_step: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage = stage
        self.total_steps = total_steps
        self.first_step = first_step
        self.tokens_per_step = tokens_per_step
        self._clock = clock
        self._start_time: float | None = None
        self._widths: dict[str, int] = {}  # of each column so far; a column only grows, so the lines stay aligned

    def started(self) -> None:
        """Starts the clock; call it when the process's first step has ended."""
        self._start_time = self._clock()

    def line(self, step: int, values: Mapping[str, float], rates: Mapping[str, float | None] | None = None) -> str:
        """One aligned line.

        Args:
          step: steps done since the start of the run.
          values: {name: number}, shown in this order.
          rates: {name: number or None}, as `format_rates` reads them.
        """
        width = len(str(self.total_steps))
        percent = 100 * step // max(1, self.total_steps)
        columns = [f"{self.stage:<10}{step:>{width}}/{self.total_steps} {percent:>3}%"]
        columns += [f"{name} {self._pad(name, format_number(value))}" for name, value in values.items()]
        seconds = self._seconds_per_step(step)
        if self.tokens_per_step:
            speed = format_count(self.tokens_per_step / seconds) if seconds else "-"
            columns.append(f"{self._pad('tok/s', speed)} tok/s")
        columns += [self._pad(name, text) for name, text in format_rates(rates or {}).items()]
        left = format_duration(seconds * max(0, self.total_steps - step)) if seconds else "-:--"
        columns.append(f"{self._pad('left', left)} left")
        return "  ".join(columns)

    def _seconds_per_step(self, step):
        """None while only the first step, which compiles, has run."""
        timed_steps = step - self.first_step - 1
        if self._start_time is None or timed_steps < 1:
            return None
        return max(self._clock() - self._start_time, 1e-9) / timed_steps

    def _pad(self, name, text):
        self._widths[name] = max(self._widths.get(name, 0), len(text))
        return text.rjust(self._widths[name])


def format_number(value: float) -> str:
    """Three decimals where they suffice, else one, or an exponent: 0.931, 12345.7, 2.1e-04."""
    if isinstance(value, numbers.Integral):
        return str(value)
    value = float(value)
    size = abs(value)
    if size == 0 or 1e-2 <= size < 1e3:
        return f"{value:.3f}"
    return f"{value:.1f}" if 1e3 <= size < 1e5 else f"{value:.1e}"


def format_count(value: float, space: str = "") -> str:
    """11800 -> 11.8k."""
    for size, suffix in SUFFIXES:
        if value >= size:
            return f"{value / size:.1f}{space}{suffix}"
    return f"{value:.0f}{space}"


def format_rates(rates: Mapping[str, float | None]) -> dict[str, str]:
    """{'mfu', 'model_flops_per_second', 'goodput': number} -> {name: '41.2% MFU', '38.2 GFLOP/s', '93.1% goodput'}.

    Each may be missing, or None while it is not known. FLOP/s are shown only without an MFU.
    """
    percent = lambda value: f"{100 * value:.1f}% "
    formats = {"mfu": (percent, "MFU"), "goodput": (percent, "goodput")}
    if "mfu" not in rates:
        formats = {"model_flops_per_second": (lambda value: format_count(value, " "), "FLOP/s")} | formats
    return {
        name: ("- " if (rate := rates[name]) is None else as_text(rate)) + unit
        for name, (as_text, unit) in formats.items()
        if name in rates
    }
