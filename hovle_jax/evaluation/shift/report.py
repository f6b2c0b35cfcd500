"""The report of shift: accuracies, robustness and cost of one or more models, with figures."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.classifiers import Asked
from hovle_jax.evaluation.clip.labelled import Labelled, open_labelled
from hovle_jax.evaluation.clip.zero_shot_report import Task, check_checkpoints, write_bad
from hovle_jax.evaluation.shift.corruptions import STRENGTHS, corrupt, find_corruptions
from hovle_jax.evaluation.shift.robustness import read_baseline
from hovle_jax.evaluation.shift.variants import Shifted, corrupted, on_data_sets, set_names, variant
from hovle_jax.system.files import write_json

COLUMNS = (
    "checkpoint", "images", "clean", "mean", "mean drop", "kept", "worst", "relative robustness",
    "effective robustness", "seconds per image", "FLOPs per image",
)  # fmt: skip
LOOKED_AT = 50  # images, among which one for the contact sheet is looked for
Say = Callable[[str], None]


def evaluate_shift(
    checkpoints: Sequence[str], task: Task, asked: Asked, corruptions: str = "", baseline: str = "", seed: int = 0,
    say: Say = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Scores each model -> its scores, which are in shift.json of its folder too, beside the figures.

    Args:
      task: its data is one set for corruptions, else two or more with commas, the clean one first.
      corruptions: 'all', or kinds and names with commas; empty = the data sets are the variants.
      baseline: a file of `robustness.read_baseline`; empty = no effective robustness.
    Raises:
      UserError: no such model, data or corruption, or none of the images can be read.
    """
    names, lines = find_corruptions(corruptions), read_baseline(baseline) if baseline else {}
    sources = [source.strip() for source in task.data.split(",") if source.strip()]
    if names and len(sources) > 1:
        raise UserError(f"--corruptions change one data set, and --data names {len(sources)}: give one")
    if not names and len(sources) < 2:
        raise UserError(
            "--data names one data set: name two or more with commas, the clean one first, or --corruptions"
        )
    if len(set(sources)) < len(sources):
        raise UserError(f"--data={task.data} names a data set twice; name each once")
    check_checkpoints(checkpoints, asked)
    sets = [open_labelled(one, task.label, say, task.outside_root).first(task.limit) for one in sources]
    results, first = [], None
    for checkpoint, folder in zip(checkpoints, task.folders(checkpoints, "shift")):
        if names:
            shifted = corrupted(asked.open(checkpoint, sets[0].names, say), sets[0], names, seed, say)
        else:
            shifted = on_data_sets(checkpoint, asked, sets, say)
        about = {"checkpoint": checkpoint, "data": task.data, "corruptions": list(names), "seed": seed}
        scores = shifted.scores(lines, first)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "shift.json", about | scores | {"variants": shifted.rows(lines)})
        write_bad(shifted.bad, folder)
        _draw(shifted, names, folder, f"{pathlib.Path(checkpoint).name} on {set_names(sources)[0]}")
        if names:
            _draw_corruptions(sets[0], names, seed, folder)
        say(f"{checkpoint}: results are in {folder}")
        results.append({"checkpoint": checkpoint, "data": task.data} | scores | {"folder": str(folder)})
        first = first or shifted
    if len(results) > 1:
        _draw_costs(results, task)
    return results


def _draw(shifted: Shifted, names, folder, title):
    from hovle_jax.report.shift import plot_heat, plot_variants

    if names:
        table = [[100 * shifted.shifted[variant(name, strength)] for strength in STRENGTHS] for name in names]
        plot_heat(np.asarray(table), names, 100 * shifted.accuracy, folder / "shift.png", title)
        return
    percent = lambda values: {name: 100 * value for name, value in values.items()}
    plot_variants(percent(shifted.clean), percent(shifted.shifted), folder / "shift.png", title)


def _draw_corruptions(labelled: Labelled, names, seed, folder):
    from hovle_jax.report.shift import plot_corruptions

    for index in range(min(LOOKED_AT, len(labelled))):
        image = labelled.item(index).image
        if not isinstance(image, BadEvent):
            made = {name: [corrupt(image, name, strength, index, seed) for strength in STRENGTHS] for name in names}
            plot_corruptions(made, folder / "corruptions.png", "corruptions by strength", min(2, len(names)))
            return


def _draw_costs(results, task):
    from hovle_jax.report.shift import plot_costs

    short = set_names([result["checkpoint"] for result in results])
    points = [(name, r["FLOPs per image"], r["clean"], r["mean"]) for name, r in zip(short, results)]
    folder = pathlib.Path(task.out) if task.out else pathlib.Path(results[0]["folder"])
    plot_costs(points, folder / "costs.png", f"accuracy and cost on {set_names(task.data.split(','))[0]}")
