"""How public benchmarks are asked: InternVL's words, as VLMEvalKit's adapter of InternVL has them."""

import functools
import re
from collections.abc import Callable

from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.evaluation.benchmark import Item
from hovle_jax.evaluation.rules.options import LETTERS
from hovle_jax.inference.generate import Prompt

MOST_TILES = 64  # of all images of a question
CHINESE = re.compile("[\u4e00-\u9fff]")
WORD = "Answer the question using a single word or phrase."
# (has options, is Chinese) -> what the question ends with
ENDINGS = {
    (True, False): "Answer with the option's letter from the given choices directly.",
    (True, True): "请直接回答选项字母。",
    (False, False): "Answer the question directly.",
    (False, True): "请直接回答问题。",
}

Words = Callable[[Item], str]


def as_asked(item: Item) -> str:
    """The question alone."""
    return item.question


def in_a_word(item: Item) -> str:
    """For texts and numbers that are compared."""
    return f"{item.question}\n{WORD}"


def in_a_word_on_its_line(item: Item) -> str:
    """MME's: the same on the question's own line."""
    return f"{item.question} {WORD}"


def yes_or_no(item: Item) -> str:
    """HallusionBench's."""
    return f"{item.question} Please answer yes or no. {WORD}"


def by_letter(item: Item) -> str:
    """The options, one a line; in Chinese where the question is; a question without options is asked directly."""
    lines = [item.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False))]
    chinese = bool(CHINESE.search("\n".join(lines)))
    return "\n".join([*lines, ENDINGS[bool(item.options), chinese]])


def tiled(words: Words, max_tiles: int | None, enlarged: int = 1) -> Callable[[Item], Prompt]:
    """What asks a model with these words, after the images.

    Several images have their numbers before them ('Image-1: '). Marks in the question itself stay where they are.

    Args:
      max_tiles: of each image, fewer where there are many images; None = the model's own.
      enlarged: how many times the first image is made as wide and as high, before it is cut.
    """
    return functools.partial(_prompt, words, max_tiles, enlarged)


def _prompt(words, max_tiles, enlarged, item):
    text, images = words(item), item.images
    count = len(images)
    if enlarged > 1 and images:
        images = (_enlarged(images[0], enlarged), *images[1:])
    if count > 1 and IMAGE_MARK not in text:
        text = "".join(f"Image-{i + 1}: {IMAGE_MARK}\n" for i in range(count)) + text
    limit = max_tiles and max(1, min(max_tiles, MOST_TILES // max(1, count)))
    return Prompt((*item.turns[:-1], (text, None)), images, item.system, (limit,) * count)


def _enlarged(image, times):
    from PIL import Image

    return image.resize((image.width * times, image.height * times), Image.Resampling.BILINEAR)
