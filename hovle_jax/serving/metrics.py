"""What /metrics shows, in Prometheus' text format."""

import bisect
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hovle_jax.inference.engine import Engine
from hovle_jax.serving.job import Job
from hovle_jax.system import compilations

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclasses.dataclass
class Histogram:
    """Counts of values by upper bounds."""

    bounds: Sequence[float] = SECONDS
    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """In Prometheus' format, where a bucket counts all values up to its bound."""
        below = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """Counted in the engine's thread and read in the server's: numbers alone, each written by one thread."""

    def __init__(self):
        self.requests: dict[str, int] = {}
        self.errors = self.prompt_tokens = self.cached_tokens = self.made_tokens = 0
        self.running = self.slots = self.free = 0
        self.first_token, self.whole = Histogram(), Histogram()
        compilations.count()

    def watch(self, engine: Engine, running: int) -> None:
        """The state after a step."""
        self.slots, self.free, self.running = engine.num_slots, engine.num_free, running

    def ended(self, job: Job, result: Any) -> None:
        """A request with its Stream, or what ended it."""
        finish = getattr(result, "finish", "") or f"error_{getattr(result, 'status', 500)}"
        self.requests[finish] = self.requests.get(finish, 0) + 1
        self.prompt_tokens += job.stream.reading.length
        self.cached_tokens += job.stream.reused
        self.made_tokens += len(job.stream.tokens)
        self.whole.add(time.monotonic() - job.arrived)
        if job.first:
            self.first_token.add(job.first - job.arrived)

    def text(self) -> str:
        """The page."""
        lines = list(_typed("hovle_requests_total", "counter", "Requests that ended, by how"))
        lines += [
            f'hovle_requests_total{{finish="{finish}"}} {count}' for finish, count in sorted(self.requests.items())
        ]
        for name, kind, about, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts", self.prompt_tokens),
            ("cached_tokens_total", "counter", "Tokens of prompts that were read before", self.cached_tokens),
            ("made_tokens_total", "counter", "Tokens of answers", self.made_tokens),
            ("engine_errors_total", "counter", "Errors of the engine itself", self.errors),
            ("compilations_total", "counter", "Programs that were compiled", compilations.count()),
            ("running_requests", "gauge", "Requests that are being answered or wait", self.running),
            ("slots", "gauge", "Requests that can be answered at once", self.slots),
            ("free_slots", "gauge", "Slots without a request", self.free),
        ):
            lines += [*_typed(f"hovle_{name}", kind, about), f"hovle_{name} {value}"]
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From a request to its first text", self.first_token),
            ("request_seconds", "From a request to its end", self.whole),
        ):
            lines += [*_typed(f"hovle_{name}", "histogram", about), *histogram.lines(f"hovle_{name}")]
        return "\n".join(lines) + "\n"


def _typed(name, kind, about):
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"
