"""Runs side by side: results, costs and differences of their configs; several seeds as mean and spread."""

import dataclasses
import itertools
import os
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.report.facts import HOST_PEAK
from hovle_jax.report.html import flatten
from hovle_jax.report.metrics import HELD_OUT
from hovle_jax.report.plots import plot_comparison, series
from hovle_jax.report.progress import format_count, format_number
from hovle_jax.report.runs import Run, is_run, runs_in, sources_of
from hovle_jax.system.progress import format_duration

FILE_NAME = "compare.png"
WIDEST = 28  # characters of a config's value
SEED = "seed"


@dataclasses.dataclass(frozen=True)
class Column:
    """A run under a name, with its config and those of the stages in its work folder that it starts from.

    Attributes:
      keys: {key: value} of the configs; other stages' keys begin with the stage's name.
    """

    name: str
    run: Run
    keys: dict[str, Any]

    @property
    def recipe(self) -> tuple:
        """Equal for runs that differ only in their seeds."""
        return tuple(sorted((key, str(value)) for key, value in self.keys.items() if key.split(".")[-1] != SEED))


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A line of the table: a number of each run, and how it is written.

    Attributes:
      of: the number of a run; None = it has none.
    """

    name: str
    of: Callable[[Run], float | None]
    text: Callable[[float], str] = format_number


def compare(paths: Sequence[str | os.PathLike], out: str | os.PathLike) -> str:
    """One table for each stage, as text; draws `out/compare.png`. Raises UserError as `open_runs`."""
    stages = open_runs(paths)
    return f"{text_of(stages)}\n\ncurves: {plot(stages, out)}"


def open_runs(paths: Sequence[str | os.PathLike]) -> dict[str, list[Column]]:
    """{stage: its runs}, from folders of runs (runs/instruct), work folders (runs), and folders of these (--seeds).

    Raises:
      UserError: a folder has no run.
    """
    folders = list(itertools.chain.from_iterable(_expand(pathlib.Path(path)) for path in paths))
    folders = list(dict.fromkeys(folder.absolute() for folder in folders))
    stages = {}
    for folder, name in zip(folders, _short_names(folders)):
        beside = runs_in(folder.parent if is_run(folder) else folder)
        for own in [folder.name] if is_run(folder) else beside:
            run = beside[own]
            stages.setdefault(run.stage, []).append(Column(name, run, _keys(run, beside)))
    return stages


def _expand(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        raise UserError(f"no folder at {path}")
    children = [child for child in sorted(path.iterdir()) if child.is_dir()]
    if is_run(path) or any(map(is_run, children)):
        return [path]
    chains = [child for child in children if any(is_run(folder) for folder in child.iterdir() if folder.is_dir())]
    if not chains:
        raise UserError(
            f"{path} has no run; give the folder of a run, such as runs/instruct, or of a chain, such as runs"
        )
    return chains


def _short_names(folders: list[pathlib.Path]) -> list[str]:
    """Where the paths differ; a single folder's name."""
    if len(folders) == 1:
        return [folders[0].name]
    parts = [folder.parts for folder in folders]
    first = os.path.commonprefix(parts)
    rest = [part[len(first) :] for part in parts]
    last = os.path.commonprefix([part[::-1] for part in rest])
    return ["/".join(part[: len(part) - len(last)]) or folder.name for part, folder in zip(rest, folders)]


def _keys(run: Run, beside: dict[str, Run]) -> dict:
    """The keys of the run's config, and of the stages that it starts from with their names."""
    found = flatten(run.config)
    for name in sources_of(run.folder.name, beside):
        found |= {f"{name}.{key}": value for key, value in flatten(beside[name].config).items()}
    return found


def differing_keys(columns: list[Column]) -> dict[str, list[str]]:
    """{key: its value in each column} of the keys in which the columns differ."""
    keys = dict.fromkeys(key for column in columns for key in column.keys)
    values = {key: [str(column.keys.get(key, "-")) for column in columns] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def quantities(columns: list[Column]) -> list[Quantity]:
    """The lines of a stage's table that at least one of its runs has."""
    held_out = dict.fromkeys(n for c in columns for row in c.run.rows for n in row if n.startswith(HELD_OUT))
    scores = dict.fromkeys(name for column in columns for name in column.run.accuracies())
    lines = [Quantity("loss (last 5% of its points)", Run.final_loss)]
    lines += [Quantity(f"held-out {n.removeprefix(HELD_OUT)}", lambda run, n=n: run.last(n)) for n in held_out]
    lines += [Quantity(name, lambda run, n=name: run.accuracies().get(n), _percent) for name in scores]
    lines += [
        Quantity("parameters trained", lambda run: run.facts.get("parameters_trained"), format_count),
        Quantity("parameters frozen", lambda run: run.facts.get("parameters_frozen"), format_count),
        Quantity("tokens seen", lambda run: run.last("tokens_seen"), format_count),
        Quantity("images seen", lambda run: run.last("images_seen"), format_count),
        Quantity("time", lambda run: run.wall_seconds or None, format_duration),
        Quantity("peak memory of the host", lambda run: run.last(HOST_PEAK), lambda size: f"{format_count(size)}B"),
    ]
    return [line for line in lines if any(line.of(column.run) is not None for column in columns)]


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def table(columns: list[Column]) -> list[list[str]]:
    """The table of one stage, as text: a heading, the quantities, the config keys that differ.

    Runs that differ only in their seed stand side by side, followed by their mean and sample standard deviation.
    """
    groups = {}
    for column in columns:
        groups.setdefault(column.recipe, []).append(column)
    # A cell is a run, or the runs of a mean.
    cells = [cell for group in groups.values() for cell in ([*group, group] if len(group) > 1 else group)]
    rows = [[columns[0].run.stage, *(_each(cells, lambda one: one.name, lambda group: f"mean ± sd of {len(group)}"))]]
    rows.append(["steps", *_each(cells, lambda column: _steps(column.run), lambda group: "")])
    for line in quantities(columns):
        of_one = lambda column, line=line: _text(line, column.run)
        rows.append([line.name, *_each(cells, of_one, lambda group, line=line: _mean_text(line, group))])
    for key, values in differing_keys(columns).items():
        of_one = lambda column, values=values: _short(values[columns.index(column)])
        rows.append([key, *_each(cells, of_one, lambda group: "")])
    return rows


def _each(cells: list, of_one: Callable[[Column], str], of_group: Callable[[list[Column]], str]) -> list[str]:
    return [of_group(cell) if isinstance(cell, list) else of_one(cell) for cell in cells]


def _steps(run: Run) -> str:
    return f"{run.step:,}" if run.finished else f"{run.step:,} of {run.config['steps']:,}"


def _text(line: Quantity, run: Run) -> str:
    value = line.of(run)
    return "-" if value is None else line.text(value)


def _mean_text(line: Quantity, group: list[Column]) -> str:
    values = [value for column in group if (value := line.of(column.run)) is not None]
    if len(values) < 2:
        return "-"
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return f"{line.text(mean)} ± {line.text(spread)}" if spread else line.text(mean)


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else "..." + text[3 - WIDEST :]


def text_of(stages: dict[str, list[Column]]) -> str:
    """The tables of all stages as aligned lines."""
    return "\n\n".join("\n".join(_aligned(table(columns))) for columns in stages.values())


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
    head, *rest = map(line, rows)
    return [head, "-" * max(map(len, [head, *rest])), *rest]


def plot(stages: dict[str, list[Column]], folder: str | os.PathLike) -> pathlib.Path:
    """The curves of all runs over each other, those of one recipe in one colour -> `folder/compare.png`."""
    panels, colors, recipes = {}, {}, {}
    for stage, columns in stages.items():
        runs = {column.name: column.run.curves() for column in columns}
        for column in columns:
            # A name keeps its colour in all panels, and shares it with other seeds of its recipe.
            recipe = recipes.setdefault(column.recipe, colors.get(column.name, f"C{len(set(colors.values()))}"))
            colors.setdefault(column.name, recipe)
        for metric in ("loss", HELD_OUT + "loss"):
            if any(series(rows, metric)[0] for rows in runs.values()):
                panels[f"{stage}: {metric.replace('held_out/', 'held-out ')}"] = (metric, runs)
    return plot_comparison(panels, pathlib.Path(folder) / FILE_NAME, colors)
