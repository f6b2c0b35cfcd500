"""The fastest way to run a step that fits: batch parts, rematerialisation and mesh, tried in the order of estimates."""

import dataclasses
import itertools

from hovle_jax.aot.estimate import Estimate, estimate
from hovle_jax.aot.report import Report
from hovle_jax.aot.report import text_of as text_of_report
from hovle_jax.aot.target import Target, TooLarge, compile_for
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError

REMATS = ("none", "dots", "full")  # offload waits for the host, which no bound counts
AXES = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))  # sizes of tensor and sequence
ROWS = (1, 2, 4, 8)  # that a device reads at a time
MOST_COMPILED = 6


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way: the flags that ask for it, its config, and what is known of it.

    Attributes:
      outcome: 'fits', 'too large', 'estimated too large' or 'not tried'.
    """

    flags: str
    config: RunConfig
    estimate: Estimate
    outcome: str = "not tried"
    report: Report | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All choices in the order of their estimated time, and the recommended one (None: nothing fits)."""

    name: str
    target: str
    choices: tuple[Choice, ...]
    best: Choice | None

    def to_dict(self):
        """For JSON."""
        row = lambda c: {
            "flags": c.flags, "outcome": c.outcome, "estimated_seconds": c.estimate.bounds.seconds,
            "estimated_memory": c.estimate.memory, "report": c.report and c.report.to_dict(),
        }  # fmt: skip
        choices = [row(choice) for choice in self.choices]
        return {"name": self.name, "target": self.target, "best": self.best and row(self.best), "choices": choices}


def choices(config: RunConfig, target: Target):
    """Every way whose sizes divide, the best first: by `_order`."""
    made = []
    for remat, (tensor, sequence), rows in itertools.product(REMATS, AXES, ROWS):
        mesh = dataclasses.replace(config.mesh, data=1, fsdp=-1, tensor=tensor, sequence=sequence)
        parts, left = divmod(config.data.batch_size, rows * len(target.devices) // (tensor * sequence))
        if left or not parts:
            continue
        execution = dataclasses.replace(config.execution, remat=remat, accumulate=parts)
        changed = dataclasses.replace(config, mesh=mesh, execution=execution)
        flags = f"--config.execution.remat={remat} --config.execution.accumulate={parts}"
        axes = {"tensor": tensor, "sequence": sequence}
        flags += "".join(f" --config.mesh.{axis}={size}" for axis, size in axes.items() if size > 1)
        try:
            made.append(Choice(flags, changed, estimate(changed, target)))
        except UserError:  # a length that the sequence axis does not divide, for one
            continue
    return sorted(made, key=_order)


def _order(choice):
    """By the time of what bounds the step; of equals by the others' too, which never hide entirely; then by memory."""
    bounds = choice.estimate.bounds
    return bounds.seconds, sum(bounds.times.values()), choice.estimate.memory


def make(config: RunConfig, target: Target, say=print):
    """Compiles choices, the fastest first, until one fits -> Plan.

    What is estimated not to fit, whose estimate leaves much out, is not compiled.
    """
    listed, compiled, best = choices(config, target), 0, None
    if not listed:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide over {len(target.devices)} devices in any way; "
            f"use {-(-config.data.batch_size // len(target.devices)) * len(target.devices)}"
        )
    for i, choice in enumerate(listed):
        if best or compiled == MOST_COMPILED:
            break
        if not choice.estimate.fits:
            listed[i] = dataclasses.replace(choice, outcome="estimated too large")
            continue
        compiled += 1
        say(f"compiling {choice.flags}: {choice.estimate.bounds.seconds:.2f} s a step at best")
        try:
            report = compile_for(choice.config, target)
        except TooLarge:
            listed[i] = dataclasses.replace(choice, outcome="too large")
            continue
        outcome = "fits" if report.memory.fits else "too large"
        listed[i] = dataclasses.replace(choice, outcome=outcome, report=report)
        best = listed[i] if report.memory.fits else None
    return Plan(f"{config.stage}:{config.preset}", target.name, tuple(listed), best)


def text_of(plan: Plan, most=16):
    """The plan for people: a table of the first choices, the recommended one, and its report."""
    lines = [f"{plan.name} on {plan.target}, by estimated time:", f"{'s a step':>9} {'MFU':>6} {'memory':>9}  choice"]
    for choice in plan.choices[:most]:
        e = choice.estimate
        memory = choice.report.memory.peak if choice.report else e.memory
        outcome = "" if choice.outcome == "not tried" else f"  [{choice.outcome}]"
        lines.append(f"{e.bounds.seconds:>9.2f} {e.bounds.mfu:>6.1%} {memory / 1e9:>6.1f} GB  {choice.flags}{outcome}")
    if len(plan.choices) > most:
        lines.append(f"... and {len(plan.choices) - most} slower ones")
    if plan.best is None:
        return "\n".join([*lines, "none of those tried fits: take more chips, or shorter rows"])
    return "\n".join([*lines, f"recommended: {plan.best.flags}", text_of_report(plan.best.report)])
