"""A linear probe of a CLIP on labelled images, and K-shot probes beside its zero-shot accuracy: figures in a folder."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.class_vectors import class_vectors
from hovle_jax.evaluation.clip.labelled import open_labelled
from hovle_jax.evaluation.clip.templates import find_templates
from hovle_jax.evaluation.clip.zero_shot_report import write_bad
from hovle_jax.evaluation.probes.features import Features, features_of
from hovle_jax.evaluation.probes.fitting import KINDS, fit_best
from hovle_jax.evaluation.probes.shots import check_shots, few_shot
from hovle_jax.evaluation.wilson import wilson_interval
from hovle_jax.inference.encoder import Encoder
from hovle_jax.system.files import write_json

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is probed, and how.

    Attributes:
      data, test: labelled images to fit and to score; see `open_labelled`.
      label: the field that names the class of rows.
      kind: of `probes.KINDS`.
      shots: images of each class; empty = the whole set alone.
      seeds: draws for each number of shots.
      templates: of the class names, for the zero-shot accuracy.
    """

    data: str
    test: str
    label: str = ""
    kind: str = "logistic"
    shots: tuple[int, ...] = ()
    seeds: int = 5
    templates: str = ""

    def check(self) -> None:
        """Raises UserError for what is no kind, no number, no template."""
        if self.kind not in KINDS:
            raise UserError(f"--kind={self.kind} is not known; use one of {', '.join(KINDS)}")
        if self.shots:
            check_shots(self.shots, self.seeds)
        find_templates(self.templates)
        if self.data == self.test:
            raise UserError(f"--data and --test are both {self.data}: a probe is scored on images it was not fitted to")


def probe(encoder: Encoder, folder: str, asked: Asked, out: pathlib.Path, say: Say) -> dict[str, Any]:
    """Fits, scores, and writes OUT/probe.json and OUT/probe.png -> what is in probe.json.

    Raises:
      UserError: no such data, or its classes cannot be probed.
    """
    sets = [open_labelled(source, asked.label, say) for source in (asked.data, asked.test)]
    train, test = (features_of(encoder, folder, one, say) for one in sets)
    labels = labels_among(test, train.names)
    own, scored, classes = (train.pooled, train.labels), (test.pooled, labels), len(train.names)
    say(f"fitting a {asked.kind} probe to {len(train.labels):,} images of {classes:,} classes")
    best = fit_best(asked.kind, *own, classes)
    result: dict[str, Any] = {"checkpoint": folder, "data": asked.data, "test": asked.test}
    result |= {"images": len(train.labels), "test_images": len(labels), "classes": classes}
    result |= {"accuracy": _percent(best.linear.accuracy(*scored)), **best.settings()}
    low, high = wilson_interval(result["accuracy"] / 100 * len(labels), len(labels))
    result["95% interval"] = [_percent(low), _percent(high)]
    vectors = class_vectors(encoder, folder, train.names, find_templates(asked.templates), say)
    result["zero_shot"] = _percent(np.mean((test.vectors @ vectors.T).argmax(1) == labels))
    shots = few_shot(asked.kind, own, scored, classes, asked.shots, asked.seeds, say)
    result["shots"] = [one.row() for one in shots]
    bad = (*train.bad, *test.bad)
    result |= {"bad_images": len(bad)} if bad else {}
    write_bad(bad, out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", result)
    if shots:
        from hovle_jax.report.shots import plot_shots

        plot_shots(result, out / "probe.png")
    return result


def labels_among(test: Features, names: Sequence[str]) -> np.ndarray:
    """The labels of test images as numbers of the training classes. Raises UserError for a class that these lack."""
    places = {name: i for i, name in enumerate(names)}
    lacking = [name for name in test.names if name not in places]
    if lacking:
        raise UserError(
            f"--test has the class {lacking[0]!r}, and {len(lacking)} in all, which --data lacks; a probe knows the "
            "classes that it was fitted to"
        )
    return np.asarray([places[name] for name in test.names], np.int32)[test.labels]


def _percent(share):
    return round(100 * float(share), 2)


def lines(result: dict[str, Any]) -> list[str]:
    """What the command prints."""
    shown = {name: value for name, value in result.items() if name != "shots"}
    made = [f"{name:20} {value}" for name, value in shown.items()]
    for row in result["shots"]:
        made.append(f"{row['shots']:>3} of a class       {row['accuracy']} +- {row['deviation']}")
    return made
