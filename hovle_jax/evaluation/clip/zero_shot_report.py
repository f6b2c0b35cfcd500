"""Zero-shot classification of labelled images by one or more models: scores, predictions and figures in a folder."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.classifiers import Asked
from hovle_jax.evaluation.clip.labelled import Labelled, open_labelled
from hovle_jax.evaluation.clip.measures import named
from hovle_jax.evaluation.clip.zero_shot import Outcome, classify, lines
from hovle_jax.evaluation.own_data import predictions_path
from hovle_jax.evaluation.results import lines_into
from hovle_jax.system.files import write_json

CONFUSED = 30  # mistakes that are listed
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """Which images are classified, and where the results go.

    Attributes:
      data, label, outside_root: see `open_labelled`.
      limit: only so many images, spread over all; 0 = all.
      out: a folder; empty = one below each model's.
    """

    data: str
    label: str = ""
    limit: int = 0
    out: str = ""
    outside_root: bool = False

    def labelled(self, say: Say) -> Labelled:
        """The images."""
        return open_labelled(self.data, self.label, say, self.outside_root).first(self.limit)

    def folders(self, checkpoints: Sequence[str], action: str) -> list[pathlib.Path]:
        """Where the results of each model go: OUT, OUT/MODEL of several, or MODEL/ACTION_DATA."""
        if not self.out:
            stem = predictions_path("", self.data).stem.removeprefix("predictions_")
            return [pathlib.Path(checkpoint) / f"{action}_{stem}" for checkpoint in checkpoints]
        names = _apart([pathlib.Path(checkpoint).absolute() for checkpoint in checkpoints])
        return [pathlib.Path(self.out) / (name if len(names) > 1 else "") for name in names]


def _apart(paths):
    """The paths' last parts, as many as tell them apart."""
    most = max(len(path.parts) for path in paths)
    for count in range(1, most + 1):
        names = ["_".join(path.parts[-count:]).strip("/") for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [path.name for path in paths]


def check_checkpoints(checkpoints: Sequence[str], asked: Asked) -> None:
    """Raises UserError where one is no model that classifies, or is named twice."""
    for checkpoint in checkpoints:
        asked.check(checkpoint)
    if len(set(checkpoints)) < len(checkpoints):
        raise UserError("--checkpoint names a model twice; name each once")


def evaluate_zero_shot(checkpoints: Sequence[str], task: Task, asked: Asked, say: Say = print) -> list[dict[str, Any]]:
    """Scores each model on the same images -> its scores, which are in scores.json of its folder too.

    Beside them are predictions.jsonl, reliability.png, confusion.png and, where some images cannot be read,
    bad_images.jsonl.

    Raises:
      UserError: no such model or data, or none of the images can be read.
    """
    check_checkpoints(checkpoints, asked)
    labelled, results = task.labelled(say), []
    for checkpoint, folder in zip(checkpoints, task.folders(checkpoints, "zeroshot")):
        classifier = asked.open(checkpoint, labelled.names, say)
        outcome = classify(classifier, labelled.names, labelled.items, len(labelled), say)
        del classifier  # before the next one is loaded
        about = {"checkpoint": checkpoint, "data": task.data} | asked.about(outcome.kind)
        results.append(
            about
            | write_outcome(
                outcome, folder, f"{pathlib.Path(checkpoint).name} on {pathlib.PurePath(task.data).name}", about
            )
        )
        unread = f"; {len(outcome.bad):,} images cannot be read and are listed there" if outcome.bad else ""
        say(f"{checkpoint}: results are in {folder}{unread}")
    return results


def write_outcome(outcome: Outcome, folder: pathlib.Path, title: str, about: dict[str, Any]) -> dict[str, Any]:
    """Writes all files of an outcome -> its scores, with the folder."""
    scores, choices = outcome.scores(), outcome.choices
    with lines_into(folder / "predictions.jsonl") as write:
        for line in lines(outcome):
            write(line)
    write_bad(outcome.bad, folder)
    per_class = [None if share != share else round(100 * share, 2) for share in choices.per_class(len(outcome.names))]
    details = {
        "per class": dict(zip(outcome.names, per_class)),
        "confused": named(choices.confused(CONFUSED), outcome.names),
    }
    write_json(folder / "scores.json", about | scores | details)
    draw(outcome, folder, title)
    return scores | {"folder": str(folder)}


def write_bad(bad: Iterable[BadEvent], folder: pathlib.Path) -> None:
    """FOLDER/bad_images.jsonl, if there are any."""
    if bad := list(bad):
        with lines_into(folder / "bad_images.jsonl") as write:
            for event in bad:
                write(dataclasses.asdict(event))


def draw(outcome: Outcome, folder: pathlib.Path, title: str) -> None:
    """The figures."""
    from hovle_jax.report import classification

    choices, count = outcome.choices, len(outcome.names)
    title = f"{title}: {100 * choices.top(1):.1f}% of {len(choices.labels):,} images"
    calibration = choices.calibration()
    shown = (calibration.counts, calibration.confidences, calibration.accuracies, folder / "reliability.png")
    classification.plot_reliability(*shown, f"calibration error {calibration.error:.3f}")
    if count <= classification.MOST_NAMES:
        classification.plot_confusion(choices.confusion(count), outcome.names, folder / "confusion.png", title)
        return
    pairs = [(outcome.names[a], outcome.names[b], n) for a, b, n in choices.confused(CONFUSED)]
    classification.plot_confused(pairs, folder / "confusion.png", title, choices.per_class(count))


def table(results: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Results as lines: a row for each model, or for one alone a line for each number."""
    if len(results) == 1:
        return [f"{name:24} {_text(value)}" for name, value in results[0].items()]
    columns = [name for name in columns if any(name in result for result in results)]
    rows = [list(columns), *([_text(result.get(name, "")) for name in columns] for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def _text(value):
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return str(value)


COLUMNS = (
    "checkpoint", "images", "classes", "top-1", "top-1 95% interval", "top-5", "mean of classes", "calibration error",
    "probabilities", "seconds per image", "FLOPs per image",
)  # fmt: skip
