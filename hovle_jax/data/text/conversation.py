"""Conversations as token ids, in InternLM2's chat template or the tokenizer's own."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from hovle_jax.data.text import chat_template
from hovle_jax.data.text.chat_template import IMAGE_MARK, Span, Turns
from hovle_jax.data.text.tokenizer import IMAGE_TOKEN, Tokenizer
from hovle_jax.errors import UserError

CAPTION_REQUEST = "describe the picture."
DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids [L] int32, and whether the model is trained to produce each (bool [L])."""

    tokens: np.ndarray
    supervised: np.ndarray


def with_image_marks(turns: Turns, num_images: int) -> list:
    """The turns with one `<image>` mark for each image; if there is no mark at all, the images come first.

    Raises:
      UserError: more or fewer marks than images.
    """
    turns = list(turns)
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if num_images and not marks:
        turns[0] = ((IMAGE_MARK + "\n") * num_images + turns[0][0], turns[0][1])
        marks = num_images
    if marks != num_images:
        raise UserError(
            f"the prompt has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} and {num_images} "
            f"image{'s were' if num_images != 1 else ' was'} given; give one image for each mark"
        )
    return turns


def internlm2_spans(turns: Turns, system: str = "") -> list[Span]:
    """The same as `chat_template.spans`, in InternLM2's template; `<s>` is not included."""
    spans = [(None, "<|im_start|>", False), ("system\n" + (system or DEFAULT_SYSTEM), None, False)]
    spans += [(None, "<|im_end|>", False)]
    for question, answer in turns:
        spans += [(None, "<|im_start|>", False)]
        before, *rest = ("user\n" + question).split(IMAGE_MARK)
        spans += [(before, None, False)]
        for text in rest:
            spans += [(None, IMAGE_MARK, False), (text, None, False)]
        spans += [(None, "<|im_end|>", False), (None, "<|im_start|>", False), ("assistant\n", None, False)]
        if answer is not None:
            spans += [(answer, None, True), (None, "<|im_end|>", True)]
    return spans


def with_image_tokens(spans: Iterable[Span], tiles: Sequence[int], tokens_per_tile: int) -> list[Span]:
    """Replaces each image by its special tokens: `tokens_per_tile` <IMG_CONTEXT> per tile, between <img> and </img>."""
    remaining, replaced = iter(tiles), []
    for span in spans:
        if span[1] == IMAGE_MARK:
            tokens = ["<img>"] + [IMAGE_TOKEN] * (next(remaining) * tokens_per_tile) + ["</img>"]
            replaced += [(None, token, False) for token in tokens]
        else:
            replaced.append(span)
    return replaced


def render(
    turns: Turns,
    system: str = "",
    tiles: Sequence[int] = (),
    tokens_per_tile: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[Span]:
    """A conversation as spans [(text or None, special token or None, is_answer)], its images included.

    Args:
      turns: ((question, answer), ...); the last answer may be None, to be generated.
      system: the system message; empty = the template's own.
      tiles: number of tiles of each image, in order; each image takes one `<image>` mark.
      tokenizer: whose chat template is used; without one, InternLM2's.
    Raises:
      UserError: more or fewer marks than images, or a template that cannot be used.
    """
    turns = with_image_marks(turns, len(tiles))
    if tokenizer is None or tokenizer.chat_template is None:
        spans = internlm2_spans(turns, system)
    else:
        spans = chat_template.spans(tokenizer, turns, system)
    return with_image_tokens(spans, tiles, tokens_per_tile)


def encode_conversation(
    tokenizer: Tokenizer, turns: Turns, system: str = "", tiles: Sequence[int] = (), tokens_per_tile: int = 0
) -> Encoded:
    """Ids of a conversation in the tokenizer's template; each answer and its end token are supervised.

    InternLM2's template begins with `<s>`; any other states its own beginning. In training (every answer
    given) each turn's text is stripped, as InternVL's preprocessing does.
    """
    if all(answer is not None for _, answer in turns):
        turns = [(question.strip(), answer.strip()) for question, answer in turns]
    tokens = _first(tokenizer)
    supervised = [False] * len(tokens)
    spans = render(turns, system, (1,) * len(tiles), 1, tokenizer)
    for is_text, run in itertools.groupby(spans, key=lambda span: span[1] is None):
        run = list(run)
        if is_text:
            ids, answers = _encode_text(tokenizer, [(text, is_answer) for text, _, is_answer in run])
        else:
            ids = [tokenizer.special(token) for _, token, _ in run if token]
            answers = [is_answer for _, _, is_answer in run]
        tokens += ids
        supervised += answers
    return _with_tiles(tokenizer, tokens, supervised, tiles, tokens_per_tile)


def _with_tiles(tokenizer, tokens, marked, tiles, tokens_per_tile):
    """Encoded, with each image's single token repeated as its tiles need.

    Repeating a token thousands of times is cheaper in an array than in a rendered text.
    """
    tokens, marked = np.asarray(tokens, np.int32), np.asarray(marked, bool)
    if not tiles:
        return Encoded(tokens, marked)
    times = np.ones(len(tokens), np.int64)
    times[tokens == tokenizer.image_id] = np.asarray(tiles) * tokens_per_tile
    return Encoded(np.repeat(tokens, times), np.repeat(marked, times))


def _encode_text(tokenizer, spans):
    """Ids of adjacent texts [(text, is_answer)], and whether each id belongs to an answer.

    They are encoded as one text, as the public code does: a tokenizer may treat the beginning of a text differently.
    """
    ids, belongs_to = tokenizer.encode_adjacent([text for text, _ in spans])
    return ids, [spans[index][1] for index in belongs_to]


def _first(tokenizer):
    """What comes before the rendered template."""
    return [tokenizer.bos] if tokenizer.chat_template is None and tokenizer.bos is not None else []


RANDOM = "\uf8ff"  # the place of distillation's random ids: Unicode's last private character


def encode_random_text(
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    count: int,
    system: str = "",
    tiles: Sequence[int] = (),
    tokens_per_tile: int = 0,
) -> Encoded:
    """The text of distillation: `count` random ids after the images in the query, `count` in the response.

    Ids are uniform below the first special one; the template surrounds them (paper, section 3.2).

    Returns:
      Encoded, whose `supervised` marks the random ids.
    """
    tokens = _first(tokenizer)
    random = [False] * len(tokens)
    turns = [(IMAGE_MARK * len(tiles) + RANDOM, RANDOM)]
    for text, token, _ in render(turns, system, (1,) * len(tiles), 1, tokenizer):
        runs = [[tokenizer.special(token)]] if token else [tokenizer.encode(t) for t in (text or "").split(RANDOM)]
        for i, ids in enumerate(runs):
            drawn = rng.integers(0, tokenizer.first_special, count).tolist() if i else []
            tokens += drawn + ids
            random += [True] * len(drawn) + [False] * len(ids)
    return _with_tiles(tokenizer, tokens, random, tiles, tokens_per_tile)
