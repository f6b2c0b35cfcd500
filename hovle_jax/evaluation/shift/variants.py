"""Accuracy under shift: the same images corrupted, or other images of the same classes, by one or more models."""

import concurrent.futures
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.classifiers import Asked, Classifier, rank_of
from hovle_jax.evaluation.clip.labelled import Labelled
from hovle_jax.evaluation.clip.zero_shot import Outcome, classify
from hovle_jax.evaluation.shift.corruptions import STRENGTHS, corrupt, reduced
from hovle_jax.evaluation.shift.robustness import CLEAN, MEAN, Line, effective_robustness, summary
from hovle_jax.evaluation.wilson import wilson_interval
from hovle_jax.system.batching import batched
from hovle_jax.system.progress import track

Say = Callable[[str], None]
IMAGES_AT_ONCE = 64  # in memory while they are corrupted


@dataclasses.dataclass(frozen=True)
class Shifted:
    """A model's accuracies, as shares.

    Attributes:
      clean: {variant: accuracy on the clean images that it is compared with}.
      shifted: {variant: accuracy}.
      images: {variant, or 'clean': how many}.
      accuracy: on the clean images.
      bad: images that cannot be read.
    """

    clean: dict[str, float]
    shifted: dict[str, float]
    images: dict[str, int]
    accuracy: float
    bad: tuple[BadEvent, ...]
    seconds_per_image: float
    flops: float

    def scores(self, lines: dict[str, Line], first: "Shifted | None" = None) -> dict[str, Any]:
        """{name: number}, in percent and percentage points.

        Args:
          lines: of baseline models, by variant or 'mean'.
          first: the model that this one's relative robustness refers to; None = no other.
        """
        count, found = self.images[CLEAN], summary(self.clean, self.shifted)
        low, high = wilson_interval(round(self.accuracy * count), count)
        made: dict[str, Any] = {"images": count, "clean": round(100 * self.accuracy, 2)}
        made |= {"clean 95% interval": [round(100 * low, 2), round(100 * high, 2)], **found}
        if first is not None:
            gain = np.mean(list(self.shifted.values())) - np.mean(list(first.shifted.values()))
            made["relative robustness"] = round(100 * float(gain), 2)
        if MEAN in lines:
            mean = float(np.mean(list(self.shifted.values())))
            made["effective robustness"] = round(effective_robustness(lines[MEAN], self.accuracy, mean), 2)
        made |= {"seconds per image": float(f"{self.seconds_per_image:.4g}"), "FLOPs per image": self.flops}
        return made | ({"bad images": len(self.bad)} if self.bad else {})

    def rows(self, lines: dict[str, Line]) -> list[dict[str, Any]]:
        """A variant each."""
        made = []
        for name, value in self.shifted.items():
            row = {"variant": name, "images": self.images[name], "accuracy": round(100 * value, 2)}
            row["drop"] = round(100 * (self.clean[name] - value), 2)
            if name in lines:
                beyond = effective_robustness(lines[name], self.clean[name], value)
                row["effective robustness"] = round(beyond, 2)
            made.append(row)
        return made


def variant(name: str, strength: int) -> str:
    """'snow 3'."""
    return f"{name} {strength}"


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions


def corrupted(classifier: Classifier, labelled: Labelled, names: Sequence[str], seed: int, say: Say) -> Shifted:
    """The accuracies on images under all strengths of these corruptions. Raises UserError if no image can be read.

    Each image is decoded once, and all its variants are made of it.
    """
    variants = [(name, strength) for name in names for strength in STRENGTHS]
    right, bad, count, tally = dict.fromkeys(variants, 0), [], 0, _Tally(classifier)
    indices = track(range(len(labelled)), say, "corruptions", "images", len(labelled))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in batched(indices, max(classifier.at_once, IMAGES_AT_ONCE)):
            images, labels = {}, []
            for index, item in zip(part, labelled.at(part), strict=True):
                if isinstance(item.image, BadEvent):
                    bad.append(item.image)
                    continue
                images[index] = reduced(item.image)
                labels.append(item.label)
            count += len(images)
            tally.clean += tally.right(list(images.values()), labels)
            for name, strength in variants:
                make = lambda index, name=name, strength=strength: corrupt(images[index], name, strength, index, seed)
                right[name, strength] += tally.right(list(threads.map(make, images)), labels)
    if not count:
        first = f": {bad[0].shard}: {bad[0].detail}" if bad else ""
        raise UserError(f"{labelled.source}: no image can be read{first}")
    accuracy = tally.clean / count
    shifted = {variant(*key): value / count for key, value in right.items()}
    images = {CLEAN: count, **dict.fromkeys(shifted, count)}
    per_image = tally.seconds / max(1, tally.images)
    return Shifted(
        dict.fromkeys(shifted, accuracy), shifted, images, accuracy, tuple(bad), per_image, classifier.flops()
    )


class _Tally:
    """Counts what is right, and how long the model takes."""

    def __init__(self, classifier):
        self.classifier, self.clean, self.images, self.seconds = classifier, 0, 0, 0.0

    def right(self, images, labels):
        total = 0
        for start in range(0, len(images), self.classifier.at_once):
            part = images[start : start + self.classifier.at_once]
            if not self.images:
                self.classifier.probabilities(part)  # compiled here, in no image's time
            before = time.monotonic()
            made = self.classifier.probabilities(part)
            self.seconds += time.monotonic() - before
            self.images += len(part)
            total += sum(rank_of(row, label) == 0 for row, label in zip(made, labels[start:]))
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Other images of the same classes


def on_data_sets(folder: str, asked: Asked, data_sets: Sequence[Labelled], say: Say) -> Shifted:
    """The accuracies on several sets, of which the first is the clean one.

    A set of fewer classes is compared with the clean images of these classes, which are then chosen among them alone
    (as ImageNet-R's 200 classes are with those of ImageNet).

    Raises:
      UserError: none of a set's images can be read, or a set has classes that the first one lacks.
    """
    base, *others = data_sets
    classifier = asked.open(folder, base.names, say)
    outcome = _outcome(classifier, base, say)
    clean_of = {base.names: outcome}
    clean, shifted, images, bad = {}, {}, {CLEAN: len(outcome.predictions)}, list(outcome.bad)
    for name, other in zip(set_names([one.source for one in data_sets])[1:], others):
        _check_classes(base, other)
        if other.names not in clean_of:
            classifier = asked.open(folder, other.names, say)
            clean_of[other.names] = _outcome(classifier, among(base, other.names), say)
        made = _outcome(classifier, other, say)
        clean[name], shifted[name] = clean_of[other.names].choices.top(1), made.choices.top(1)
        images[name] = len(made.predictions)
        bad += made.bad
    costs = (outcome.seconds_per_image, outcome.flops)
    return Shifted(clean, shifted, images, outcome.choices.top(1), tuple(bad), *costs)


def _outcome(classifier, labelled: Labelled, say) -> Outcome:
    return classify(classifier, labelled.names, labelled.items, len(labelled), say, labelled.source)


def _check_classes(base, other):
    lacking = [name for name in other.names if name not in base.names]
    if lacking:
        raise UserError(
            f"{other.source} has the class {lacking[0]!r}, and {len(lacking)} in all, which {base.source} lacks: shift "
            "is measured over the same classes; give both the same names (classnames.txt)"
        )


def among(labelled: Labelled, names: tuple[str, ...]) -> Labelled:
    """The images of some classes, numbered as in `names`."""
    places = {labelled.names.index(name): i for i, name in enumerate(names)}
    chosen = np.flatnonzero([label in places for label in labelled.labels.tolist()])
    labels = np.asarray([places[label] for label in labelled.labels[chosen].tolist()], np.int32)
    return dataclasses.replace(labelled.at_places(chosen), names=names, labels=labels)


def set_names(sources: Sequence[str]) -> list[str]:
    """What tells sources apart: their last names, or all of them where these are equal."""
    short = [pathlib.PurePath(source).name for source in sources]
    return short if len(set(short)) == len(short) else list(sources)
