"""A way to run a step that fits: rematerialisation and microbatches, compiled until one does. Time is not forecast."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from hovle_jax.aot.least_traffic import least_traffic
from hovle_jax.aot.programs import TooLarge, compile_for, set_up
from hovle_jax.aot.report import Report, flops_of, gb, text_of
from hovle_jax.config import RunConfig
from hovle_jax.hardware.topology import Topology
from hovle_jax.training.stages import find

REMATS = ("none", "dots", "full")  # offload waits for the host, of which nothing is known here
ROWS = (4, 2, 1)  # of a device in a microbatch


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way, and what is known of it."""

    flags: str  # that ask for it
    config: RunConfig
    hardware: float  # FLOPs of a step
    least: float  # bytes that a device must send in it
    outcome: str = "not compiled"  # or 'fits' or 'too large'
    memory: float | None = None  # bytes of a device, where the compiler has said them
    report: Report | None = None  # of one that compiles


def candidates(config: RunConfig, target: Topology) -> list[Candidate]:
    """The list, in the order in which it is compiled. Raises UserError for a config that cannot run on the target."""
    replace, stage = dataclasses.replace, find(config.stage)
    ways = lambda **values: replace(config, execution=replace(config.execution, **values))
    rows = config.data.batch_size // set_up(ways(accumulate=1), target).placement.batch_shards  # of a device
    counts = [rows // n for n in ROWS if rows % n == 0] if stage.loss_weights else [1]
    made = []
    for remat, count in itertools.product(REMATS, counts):
        changed = ways(remat=remat, accumulate=count)
        flags = f"--config.execution.remat={remat} --config.execution.accumulate={count}"
        run = set_up(changed, target)
        least = sum(least_traffic(stage, run).values())
        made.append(Candidate(flags, changed, flops_of(changed, run).hardware, least))
    return best_first(made)


def best_first(made: list[Candidate]) -> list[Candidate]:
    """The one place that orders candidates: fewest hardware FLOPs; of equals the fewest bytes that must be sent.

    Neither is time. A forecast from the compiler's schedule would order them here.
    """
    return sorted(made, key=lambda candidate: (candidate.hardware, candidate.least))


def make(config: RunConfig, target: Topology, say: Callable[[str], None] = print) -> list[Candidate]:
    """Compiles the candidates until one fits, which is the recommended one; what comes after it is not compiled."""
    listed = candidates(config, target)
    for i, candidate in enumerate(listed):
        say(f"compiling {candidate.flags}")
        try:
            report = compile_for(candidate.config, target)
            fits, memory = report.fits, report.memory["peak"]
        except TooLarge as error:
            report, fits, memory = None, False, error.needed
        outcome = "fits" if fits else "too large"
        listed[i] = dataclasses.replace(candidate, outcome=outcome, memory=memory, report=report)
        if fits:
            break
    return listed


def recommended(listed: list[Candidate]) -> Candidate | None:
    return next((candidate for candidate in listed if candidate.outcome == "fits"), None)


def to_dict(listed: list[Candidate]) -> dict[str, Any]:
    """For JSON: the recommended flags (None: nothing fits), and all candidates."""
    best, keys = recommended(listed), ("flags", "hardware", "least", "outcome", "memory")
    rows = [{key: getattr(c, key) for key in keys} | {"report": c.report and c.report.to_dict()} for c in listed]
    return {"best": best and best.flags, "candidates": rows}


def plan_text(listed: list[Candidate]) -> str:
    """For people: a table, the recommended candidate, and its report."""
    lines = ["fewest FLOPs first; time is not forecast:", f"{'hardware FLOPs':>14} {'memory':>11} {'sent':>11}  flags"]
    for c in listed:
        memory, sent = gb(c.memory) if c.memory else "", gb(c.report.sent) if c.report else ""
        lines.append(f"{c.hardware:>14.3g} {memory:>11} {sent:>11}  {c.flags} [{c.outcome}]")
    best = recommended(listed)
    if best is None or best.report is None:
        return "\n".join([*lines, "none of these fits: take more chips"])
    return "\n".join([*lines, f"recommended: {best.flags}", text_of(best.report)])
