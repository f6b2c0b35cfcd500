"""A run, read from its folder, for pages and comparisons."""

import dataclasses
import math
import os
import pathlib
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.report.facts import DEVICE_PEAK, HOST_PEAK, SEEN, read_facts
from hovle_jax.report.goodput import read_time
from hovle_jax.report.metrics import HELD_OUT, MEMORY, SCORES, TIMES, WALL, read_metrics
from hovle_jax.report.plots import series
from hovle_jax.report.progress import format_count, format_number
from hovle_jax.system.files import read_json
from hovle_jax.system.progress import format_duration

NOT_CURVES = (WALL, *SEEN)
NOT_CURVES_BEGIN = (TIMES, MEMORY, SCORES)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of one stage, finished or not.

    Attributes:
      config: the resolved one, a nested dict.
      rows: from metrics.jsonl.
      results: from results.json; {} before the run's report is written.
      facts: from facts.json.
      seconds: {activity: seconds} over all processes.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any]
    facts: dict[str, Any]
    seconds: dict[str, float]

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Run":
        """The run in a folder. Raises UserError where there is none."""
        folder = pathlib.Path(folder)
        if not is_run(folder):
            raise UserError(f"{folder} is not a run's folder: it has no config.json")
        results = folder / "results.json"
        return cls(
            folder=folder,
            config=read_json(folder / "config.json", ["stage", "steps"]),
            rows=read_metrics(folder),
            results=read_json(results) if results.is_file() else {},
            facts=read_facts(folder),
            seconds=read_time(folder)[1],
        )

    @property
    def stage(self) -> str:
        return self.config["stage"]

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def finished(self) -> bool:
        return self.step >= self.config["steps"]

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    def last(self, metric: str) -> float | None:
        """The newest value of a metric; None without one."""
        values = series(self.rows, metric)[1]
        return values[-1] if values else None

    def final_loss(self) -> float | None:
        """The mean of the last twentieth of the logged losses, as one batch's says little; None without a loss."""
        values = [value for value in series(self.rows, "loss")[1] if math.isfinite(value)]
        last = values[-max(1, len(values) // 20) :]
        return sum(last) / len(last) if last else None

    def epochs(self) -> float | None:
        """How often the training data was read; None where it is unknown."""
        samples, seen = self.facts.get("samples"), self.last("samples_seen")
        return seen / samples if samples and seen is not None else None

    def accuracies(self) -> dict[str, float]:
        """{name: percent} of the scores, the main one first."""
        return {name: value for name, value in self.results.items() if name.startswith("accuracy")}

    def curves(self) -> list[dict]:
        """The rows with only what is worth a curve: no growing sums, nothing that is known only at the end."""
        curve = lambda name: name not in NOT_CURVES and not name.startswith(NOT_CURVES_BEGIN)
        return [{name: value for name, value in row.items() if curve(name)} for row in self.rows]

    def headline(self) -> str:
        """The result in a few words: the main score, else the held-out loss, else the loss."""
        for name, value in self.accuracies().items():
            return f"{value:.2f}% {name}"
        steps, losses = series(self.rows, HELD_OUT + "loss")
        if losses:
            change = [losses[0], losses[-1]] if len(losses) > 1 else losses
            return f"held-out loss {' → '.join(map(format_number, change))}"
        loss = self.final_loss()
        return "" if loss is None else f"loss {format_number(loss)}"

    def about(self) -> dict[str, str]:
        """{name: text}: facts about the run, without what is unknown."""
        facts, epochs = self.facts, self.epochs()
        found = {"steps": f"{self.step:,} of {self.config['steps']:,}"}
        if "parameters_trained" in facts:
            trained, frozen = facts["parameters_trained"], facts["parameters_frozen"]
            found["parameters"] = f"{trained:,} trained, {frozen:,} frozen"
        for name, metric in zip(("tokens", "images", "samples"), SEEN):
            if seen := self.last(metric):
                found[f"{name} seen"] = f"{int(seen):,}"
        if epochs is not None:
            found["epochs"] = f"{epochs:.2f} of {facts['samples']:,} samples"
        busy = self.seconds.get("training", 0) + self.seconds.get("data", 0)
        tokens = self.last("tokens_seen")
        if busy and tokens:
            found["speed"] = f"{format_count(tokens / busy)} tokens a second while training"
        for name, metric in (("peak memory, host", HOST_PEAK), ("peak memory, device", DEVICE_PEAK)):
            if peak := self.last(metric):
                found[name] = f"{format_count(peak, ' ')}B"
        found["time"] = format_duration(self.wall_seconds)
        return found | {name: facts[name] for name in ("commit", "command") if facts.get(name)}


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run's: the config.json of a model or an import names no stage."""
    path = folder / "config.json"
    return path.is_file() and "stage" in read_json(path)


def runs_in(workdir: str | os.PathLike) -> dict[str, Run]:
    """{folder name: run} of a work folder, each run after those that it starts from."""
    workdir = pathlib.Path(workdir)
    found = {path.name: Run.read(path) for path in sorted(workdir.iterdir()) if path.is_dir() and is_run(path)}
    # Visit the end of the chain first: the other stages then come in the order in which it needs them.
    ends = sorted(found, key=lambda name: (-len(sources_of(name, found)), name))
    return {name: found[name] for end in ends for name in [*sources_of(end, found), end]}


def sources_of(name: str, runs: dict[str, Run]) -> list[str]:
    """The runs that a run starts from, directly or not, each after its own sources."""
    ordered, seen = [], {name}

    def visit(current):
        for source in runs[current].config.get("init", {}).values():
            if source in runs and source not in seen:
                seen.add(source)
                visit(source)
                ordered.append(source)

    visit(name)
    return ordered
