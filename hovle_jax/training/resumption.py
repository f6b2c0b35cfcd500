"""What is not as it was when a run is resumed: what would mix two runs is refused, what moves last bits is said."""

import pathlib
from collections.abc import Mapping
from typing import Any

from hovle_jax.config import ExecutionConfig, HealthConfig, RunConfig
from hovle_jax.hosts import distributed
from hovle_jax.report.facts import read_facts

# Of the execution: what changes how numbers are rounded; the order of sums, or which are computed again.
ROUNDING = ("attention", "unroll_layers", "remat", "accumulate", "vocab_chunk", "zero")
RULES = ("on_bad_step", "spike_sigmas")  # of the health: which updates are left out


def conditions(execution: ExecutionConfig, health: HealthConfig) -> dict[str, Any]:
    """What a run's numbers depend on beside its config: kept with its facts.

    Args:
      execution: resolved, so that 'auto' of another machine is seen.
    """
    values = {f"execution.{name}": getattr(execution, name) for name in ("dtype", *ROUNDING)}
    rules = {f"health.{name}": getattr(health, name) for name in RULES}
    return {"conditions": values | rules, "software": distributed.software()}


def changes(folder: pathlib.Path, now: Mapping[str, Any]) -> list[str]:
    """Compares the `conditions` of a run that is resumed with those of its last process -> lines to say.

    Raises:
      SharedError: it computed in another type.
    """
    facts, lines = read_facts(folder), []
    differing = lambda part: {
        name: (before, now[part][name])
        for name, before in facts.get(part, {}).items()
        if name in now[part] and now[part][name] != before
    }
    conditions, software = differing("conditions"), differing("software")
    if "execution.dtype" in conditions:
        before, after = conditions["execution.dtype"]
        raise distributed.SharedError(
            f"{folder} holds a run that computes in {before}, not {after}; go on with "
            f"--config.execution.dtype={before}, or choose another --workdir"
        )
    told = lambda found: ", ".join(f"{name} {after!r} (was {before!r})" for name, (before, after) in found.items())
    if conditions:
        lines.append(f"resumes with {told(conditions)}: its numbers are no longer those of an unbroken run to the bit")
    if software:
        lines.append(f"resumes with other software: {told(software)}; its numbers may differ in their last bits")
    return lines


def check_stop(folder: pathlib.Path, config: RunConfig, newest: int) -> None:
    """Raises SharedError where a run is to stop before the step that its newest checkpoint has reached."""
    if newest > config.last_step:
        raise distributed.SharedError(
            f"stop_at_step={config.stop_at_step} is behind step {newest}, which the run in {folder} has reached; set a "
            "later one, or 0 to go on to the end"
        )
