"""easy-VQA's official test split: questions, captions, and zero-shot classification with CLIP."""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from hovle_jax.corpora import easy_vqa
from hovle_jax.data.text.conversation import CAPTION_REQUEST
from hovle_jax.evaluation.asking import Ask
from hovle_jax.evaluation.benchmark import Benchmark, Item
from hovle_jax.inference.encoder import Encoder
from hovle_jax.inference.load import Loaded

SOURCE = "easy_vqa"


def answer_kind(expected: str) -> str:
    """'yes/no', 'colour' or 'shape'."""
    if expected in ("yes", "no"):
        return "yes/no"
    return "shape" if expected in easy_vqa.SHAPES else "colour"


def questions() -> Iterator[Item]:
    """All 9,673 test questions, in groups by their kind of answer."""
    for example in easy_vqa.load("test"):
        for question, answer in example.questions:
            yield Item.of(example.image, question, answer, group=answer_kind(answer))


def captions() -> Iterator[Item]:
    """The 888 test images whose caption is determined."""
    return (Item.of(p.image, CAPTION_REQUEST, p.caption) for p in easy_vqa.load("test") if p.caption)


def unasked() -> Iterator[Item]:
    """The same without a question: CLIP is not asked."""
    return (Item.of(p.image, "", p.caption) for p in easy_vqa.load("test") if p.caption)


def word(index: int, caption: str) -> str:
    """A word of 'a blue triangle'; empty where a caption is shorter."""
    return "".join(caption.split()[index : index + 1])


def classified(loaded: Loaded, prompt: Callable, max_new_tokens: int, batch_size: int) -> Ask:
    """What gives an image the one of the 24 colour x shape captions whose vector is nearest."""
    encoder = Encoder(loaded, batch_size)
    classes = encoder.texts(easy_vqa.CAPTIONS)

    def answers(items):
        for vectors in encoder.image_batches(item.images[0] for item in items):
            yield from (easy_vqa.CAPTIONS[i] for i in np.argmax(vectors @ classes.T, axis=1))

    return answers


QUESTIONS = Benchmark(items=questions, max_new_tokens=8, batch_size=256, source=SOURCE)
CAPTIONS = Benchmark(
    items=captions,
    max_new_tokens=8,
    batch_size=64,
    metric="accuracy of captions",
    unit="test images",
    source=SOURCE,
    at_the_end=240,
)
ZERO_SHOT = Benchmark(
    items=unasked,
    components=("clip",),
    ask=classified,
    batch_size=256,
    parts={"colour": functools.partial(word, 1), "shape": functools.partial(word, 2)},
    unit="images",
    source=SOURCE,
)
