"""The fastest way to run a step that fits: rematerialisation and microbatches, compiled and ordered by the forecast."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from hovle_jax.aot.programs import TooLarge, compile_for, set_up
from hovle_jax.aot.report import Report, gb, span, text_of
from hovle_jax.config import RunConfig
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.transformer import MATMULS
from hovle_jax.training.stages import find

REMATS = ("full", MATMULS, "none")  # by memory, least first; offload waits for the host, of which nothing is known here
ROWS = (1, 2, 4)  # of a device in a microbatch; by memory too
MOST = 8  # that are compiled


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way, and what is known of it."""

    flags: str  # that ask for it
    config: RunConfig
    size: tuple[int, int]  # its places in REMATS and ROWS: no smaller one needs more memory; -1: not among them
    outcome: str = "not compiled"  # or 'fits', 'too large', 'larger than one that is too large'
    memory: float | None = None  # bytes of a device, where the compiler has said them
    report: Report | None = None  # of one that compiles

    @property
    def seconds(self) -> float:
        """The middle of its forecast."""
        return self.report.forecast.middle if self.report and self.report.forecast else float("inf")


def candidates(config: RunConfig, target: Topology) -> list[Candidate]:
    """The config as it is, then others, least memory first. Raises UserError for what cannot run on the target."""
    replace, stage, e = dataclasses.replace, find(config.stage), config.execution
    ways = lambda **values: replace(config, execution=replace(e, **values))
    own = set_up(config, target).accumulate
    rows = config.data.batch_size // set_up(ways(accumulate=1), target).placement.batch_shards  # of a device
    counts = {rows // n: i for i, n in enumerate(ROWS) if rows % n == 0} if stage.loss_weights else {1: 0}
    place = (REMATS.index(e.remat) if e.remat in REMATS else -1, counts.get(own, -1))
    made = [Candidate("", config, place)]
    for (i, remat), (count, j) in itertools.product(enumerate(REMATS), counts.items()):
        if (i, j) != place:
            flags = f"--config.execution.remat={remat} --config.execution.accumulate={count}"
            made.append(Candidate(flags, ways(remat=remat, accumulate=count), (i, j)))
    return made


def make(config: RunConfig, target: Topology, say: Callable[[str], None] = print) -> list[Candidate]:
    """Compiles the first MOST candidates, but for those larger than one that does not fit; fastest first."""
    listed, compiled = candidates(config, target), 0
    for i, candidate in enumerate(listed):
        too_large = [c.size for c in listed[:i] if c.outcome == "too large" and min(c.size) >= 0]
        if any(a >= c and b >= d for (a, b), (c, d) in itertools.product([candidate.size], too_large)):
            listed[i] = dataclasses.replace(candidate, outcome="larger than one that is too large")
        elif compiled < MOST:
            say(f"compiling {candidate.flags or 'the config as it is'}")
            listed[i], compiled = _compile(candidate, target), compiled + 1
    return best_first(listed)


def _compile(candidate, target):
    try:
        report = compile_for(candidate.config, target)
    except TooLarge as error:
        return dataclasses.replace(candidate, outcome="too large", memory=error.needed)
    outcome = "fits" if report.fits else "too large"
    return dataclasses.replace(candidate, outcome=outcome, memory=report.memory["peak"], report=report)


def best_first(made: list[Candidate]) -> list[Candidate]:
    """The one place that orders candidates: those that fit by the middle of their forecast, then the others."""
    return sorted(made, key=lambda candidate: (candidate.outcome != "fits", candidate.seconds))


def recommended(listed: list[Candidate]) -> Candidate | None:
    return next((candidate for candidate in best_first(listed) if candidate.outcome == "fits"), None)


def to_dict(listed: list[Candidate]) -> dict[str, Any]:
    """For JSON: the recommended flags (None: nothing fits; '': the config as it is), and all candidates."""
    best, keys = recommended(listed), ("flags", "outcome", "memory")
    rows = [{key: getattr(c, key) for key in keys} | {"report": c.report and c.report.to_dict()} for c in listed]
    return {"best": None if best is None else best.flags, "candidates": rows}


def plan_text(listed: list[Candidate]) -> str:
    """For people: a table, the recommended candidate, why, and its report."""
    lines = [f"{'seconds':>16} {'MFU':>12} {'memory':>11} {'sent':>11}  flags"]
    for c in listed:
        r, memory = c.report, gb(c.memory) if c.memory else ""
        seconds = span((r.forecast.low, r.forecast.high), ".3g") if r and r.forecast else ""
        mfu, sent = (span(r.speed["mfu"], ".0%"), gb(r.sent)) if r and r.speed else ("", "")
        lines.append(f"{seconds:>16} {mfu:>12} {memory:>11} {sent:>11}  {_name(c)} [{c.outcome}]")
    best = recommended(listed)
    if best is None or best.report is None:
        return "\n".join([*lines, "none of these fits: take more chips"])
    return "\n".join([*lines, f"recommended: {_name(best)}", *_why(best, listed), text_of(best.report)])


def _name(candidate):
    return candidate.flags or "the config as it is"


def _why(best, listed):
    """Against the config as it is, or against the next best where it is the best."""
    other = next((c for c in listed if c is not best and c.outcome == "fits" and (not c.flags or not best.flags)), None)
    if other is None:
        return ["  it is the only one that fits" if best.flags else "  nothing else fits"]
    ours, theirs = best.report.forecast.kinds, other.report.forecast.kinds
    middle = lambda kinds, name: sum(kinds.get(name, (0, 0))) / 2
    changes = ", ".join(f"{name} {middle(ours, name) - middle(theirs, name):+.2g} s" for name in ours | theirs)
    less = f"{1 - best.seconds / other.seconds:.0%} less time than {_name(other)}, by the middle of both"
    return [f"  {less}", f"  {changes}"]
