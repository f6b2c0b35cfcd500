"""Classifies labelled images, one in memory at a time, and keeps what scores and figures need."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hovle_jax.data.bad_samples import BadEvent, count_reasons
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.classifiers import Classifier, best, rank_of
from hovle_jax.evaluation.clip.labelled import Item
from hovle_jax.evaluation.clip.measures import Choices
from hovle_jax.system.batching import batched
from hovle_jax.system.progress import track

KEPT = 5  # classes of each image in the file of predictions


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What an image was taken for.

    Attributes:
      best: ((class, probability), ...), the likeliest first.
      rank: how many classes were likelier than the right one.
    """

    label: int
    where: tuple[str, str]
    best: tuple[tuple[int, float], ...]
    rank: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A classifier on a set of images.

    Attributes:
      bad: images that cannot be read, or have no class.
      seconds: of all of it, reading included, but without compiling.
      seconds_per_image: of the model alone.
    """

    names: tuple[str, ...]
    kind: str
    predictions: tuple[Prediction, ...]
    bad: tuple[BadEvent, ...]
    seconds: float
    seconds_per_image: float
    flops: float

    @property
    def choices(self) -> Choices:
        """As arrays."""
        column = lambda read, dtype: np.asarray([read(p) for p in self.predictions], dtype)
        return Choices(
            column(lambda p: p.label, np.int32),
            column(lambda p: p.best[0][0], np.int32),
            column(lambda p: p.rank, np.int32),
            column(lambda p: p.best[0][1], np.float32),
        )

    def scores(self) -> dict[str, Any]:
        """{name: number}, of all."""
        found: dict[str, Any] = {"images": len(self.predictions), "classes": len(self.names)}
        found |= self.choices.scores(len(self.names))
        found |= {"chance": round(100 / len(self.names), 2), "probabilities": self.kind}
        found |= {"images per second": round(len(self.predictions) / max(self.seconds, 1e-9), 2)}
        found |= {"seconds per image": float(f"{self.seconds_per_image:.4g}"), "FLOPs per image": self.flops}
        return found | ({"bad images": count_reasons(self.bad)} if self.bad else {})


def classify(
    classifier: Classifier,
    names: Sequence[str],
    items: Iterable[Item],
    total: int,
    say: Callable[[str], None] | None = None,
    title: str = "zero-shot",
) -> Outcome:
    """The outcome of all items.

    Args:
      total: how many items there are.
      say: called with lines of progress.
    Raises:
      UserError: none of the images can be read.
    """
    predictions, bad = [], []
    start, seconds_in_model = time.monotonic(), 0.0
    tracked = track(items, say, title, "images", total) if say else items
    reduce = lambda item: (
        item if isinstance(item.image, BadEvent) else item._replace(image=classifier.reduced(item.image))
    )
    for part in batched(map(reduce, tracked), classifier.at_once):
        good = [item for item in part if not isinstance(item.image, BadEvent)]
        bad += [item.image for item in part if isinstance(item.image, BadEvent)]
        if good:
            images = [item.image for item in good]
            if not predictions:  # what is compiled takes no time of theirs
                warming = time.monotonic()
                classifier.probabilities(images)
                start += time.monotonic() - warming
            before = time.monotonic()
            made = classifier.probabilities(images)
            seconds_in_model += time.monotonic() - before
            predictions += map(_prediction, good, made)
    if not predictions:
        raise UserError(_nothing(bad))
    seconds = time.monotonic() - start
    per_image = seconds_in_model / len(predictions)
    outcome = (tuple(predictions), tuple(bad), seconds, per_image, classifier.flops())
    return Outcome(tuple(names), classifier.kind, *outcome)


def _prediction(item, probabilities):
    shown = tuple((int(i), float(probabilities[i])) for i in best(probabilities, KEPT))
    return Prediction(item.label, item.where, shown, rank_of(probabilities, item.label))


def _nothing(bad):
    if not bad:
        return "there are no images to classify"
    reasons = ", ".join(f"{reason} {count}" for reason, count in count_reasons(bad).items())
    return f"no image can be read ({reasons}); the first: {bad[0].shard} {bad[0].sample}: {bad[0].detail}"


def lines(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """Each image as a line of JSON."""
    for index, one in enumerate(outcome.predictions):
        chosen = [[outcome.names[i], round(p, 6)] for i, p in one.best]
        row = {"index": index, "source": one.where[0], "row": one.where[1], "label": outcome.names[one.label]}
        yield row | {"answer": chosen[0][0], "right": one.rank == 0, "rank": one.rank, "best": chosen}
