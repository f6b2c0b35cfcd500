"""easy-VQA (PyPI `easy-vqa==1.0`, MIT): 5,000 images of one shape each, 48,248 questions, official train/test split.

The package is a dependency of this project, so nothing is fetched at run time. Its images are prepared once, as a
TFDS data set of ArrayRecord files in the cache folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.system.cache import cache_dir, locked

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CAPTIONS = tuple(f"a {color} {shape}" for color in COLORS for shape in SHAPES)
IMAGES = {"train": 4000, "test": 1000}
QUESTIONS_SHA256 = {
    "train": "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5",
    "test": "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its questions.

    Attributes:
      image: [64, 64, 3] uint8.
      questions: ((question, answer), ...).
      caption: deduced from the questions; empty if they do not determine shape and colour.
    """

    index: int
    image: np.ndarray
    questions: tuple
    caption: str


def deduce_caption(questions: Iterable[tuple[str, str]]) -> str:
    """The caption that the questions and answers imply, directly, by yes or no, or by elimination; '' if undetermined.

    'is no red shape present?' and 'is there not a circle?' are negated: to them, 'no' affirms.
    """
    possible = [set(COLORS), set(SHAPES)]
    for question, answer in questions:
        words = re.findall(r"\w+", question)
        kind = reply_kind(question, answer)
        for values in possible:
            vocabulary = COLORS if values <= set(COLORS) else SHAPES
            named = {w for w in words if w in vocabulary}
            if answer in vocabulary:
                values &= {answer}
            elif named and kind == "denied":
                values -= named
            elif named:
                values &= named
    if any(len(values) != 1 for values in possible):
        return ""
    return f"a {possible[0].pop()} {possible[1].pop()}"


def reply_kind(question: str, answer: str) -> str:
    """'open', or for a yes/no question 'affirmed' or 'denied': whether the answer says that the thing is there."""
    if answer not in ("yes", "no"):
        return "open"
    return "affirmed" if (answer == "yes") != is_negated(question) else "denied"


def is_negated(question: str) -> bool:
    """Whether a question asks if something is absent: 'is there not a circle?'."""
    words = re.findall(r"\w+", question)
    return "not" in words or "no" in words


def balance_groups(examples: Iterable[Example], negated_share: float) -> list[tuple[float, list[Example]]]:
    """Groups of questions and their weights, such that the wording of a question says nothing about its answer.

    In the corpus six in seven yes/no answers about colours deny, so that a model long learns to deny without looking.
    With these weights one question in five is open; two in five of the others are affirmed, for colours as for shapes.

    Args:
      negated_share: the share of negated questions among yes/no questions (in the corpus: half).
    Returns:
      [(weight, examples, each with the group's question first)]; groups without a question are left out.
    """
    groups = {}
    for example in examples:
        for question, answer in example.questions:
            kind = reply_kind(question, answer)
            about_shape = any(shape in question for shape in SHAPES)
            key = (kind, is_negated(question), about_shape) if kind != "open" else (kind, False, False)
            others = tuple(pair for pair in example.questions if pair != (question, answer))
            first = dataclasses.replace(example, questions=((question, answer), *others))
            groups.setdefault(key, []).append(first)

    def weight(kind, negated, about_shape):
        if kind == "open":
            return 1.0
        return {"affirmed": 0.8, "denied": 1.2}[kind] * (negated_share if negated else 1 - negated_share)

    return [(weight(*key), group) for key, group in sorted(groups.items()) if weight(*key)]


def _package_folder():
    try:
        return importlib.resources.files("easy_vqa") / "data"
    except ModuleNotFoundError:
        raise UserError("the package easy-vqa is not installed; run: pip install easy-vqa==1.0") from None


def _questions(split):
    raw = (_package_folder() / split / "questions.json").read_bytes()
    if hashlib.sha256(raw).hexdigest() != QUESTIONS_SHA256[split]:
        raise UserError(f"easy-vqa's {split}/questions.json is not that of version 1.0; run: pip install easy-vqa==1.0")
    grouped = [[] for _ in range(IMAGES[split])]
    for question, answer, index in json.loads(raw):
        grouped[index].append((question, answer))
    return grouped


@functools.cache
def _builder_class():
    """The TFDS builder's class; in a function because the import is heavy."""
    absl = logging.getLogger("absl")
    absl.setLevel(max(absl.level, logging.ERROR))  # a command may have silenced more
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class EasyVqa(tfds.core.GeneratorBasedBuilder):
        """Images and questions of easy-VQA."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Sequence(tfds.features.Text())
            features = tfds.features.FeaturesDict(
                {
                    "index": np.int32,
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "questions": text,
                    "answers": text,
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in IMAGES}

        def _generate_examples(self, split):
            images = _package_folder() / split / "images"
            for index, pairs in enumerate(_questions(split)):
                yield (
                    index,
                    {
                        "index": index,
                        "image": (images / f"{index}.png").read_bytes(),
                        "questions": [q for q, _ in pairs],
                        "answers": [a for _, a in pairs],
                    },
                )

    return EasyVqa


def load(split: str) -> list[Example]:
    """All examples of a split, in the official order (decoded: 49 MB for 'train').

    Raises:
      UserError: the split is unknown, or the package is missing or of another version.
    """
    if split not in IMAGES:
        raise UserError(f"easy_vqa has no split {split!r}; use one of {', '.join(IMAGES)}")
    folder = cache_dir("tfds")
    with locked(folder), contextlib.redirect_stdout(io.StringIO()):  # it announces a download that never happens
        make_builder: Any = _builder_class()  # TFDS's own decorators hide the arguments
        builder = make_builder(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
    examples = []
    for row in builder.as_data_source(split):
        pairs = tuple((q.decode(), a.decode()) for q, a in zip(row["questions"], row["answers"]))
        examples.append(Example(int(row["index"]), row["image"], pairs, deduce_caption(pairs)))
    return sorted(examples, key=lambda example: example.index)


def corpus(examples: Iterable[Example]) -> Iterator[str]:
    """All questions, answers and captions, repeated ones too: the text that a tokenizer is trained on."""
    for example in examples:
        for question, answer in example.questions:
            yield question
            yield answer
        if example.caption:
            yield example.caption
