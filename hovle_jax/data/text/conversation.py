"""Conversations as ids, by InternLM2's chat template or the tokenizer's own; special tokens enter through it alone."""

import dataclasses
import itertools

import numpy as np

from hovle_jax.data.text import chat_template
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.tokenizer import IMAGE_TOKEN
from hovle_jax.errors import UserError

CAPTION_REQUEST = "describe the picture."
DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids [L] int32, and for each whether a model is trained to produce it (bool [L])."""

    tokens: np.ndarray
    supervised: np.ndarray


def with_image_marks(turns, num_images):
    """The turns with one `<image>` mark for each image; where there is none at all, they are put in front.

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


def internlm2_parts(turns, system=""):
    """InternLM2's template, as `chat_template.parts` gives those of others; `<s>` is not included."""
    parts = [(None, "<|im_start|>", False), ("system\n" + (system or DEFAULT_SYSTEM), None, False)]
    parts += [(None, "<|im_end|>", False)]
    for question, answer in turns:
        parts += [(None, "<|im_start|>", False)]
        before, *rest = ("user\n" + question).split(IMAGE_MARK)
        parts += [(before, None, False)]
        for text in rest:
            parts += [(None, IMAGE_MARK, False), (text, None, False)]
        parts += [(None, "<|im_end|>", False), (None, "<|im_start|>", False), ("assistant\n", None, False)]
        if answer is not None:
            parts += [(answer, None, True), (None, "<|im_end|>", True)]
    return parts


def with_image_tokens(parts, tiles, tokens_per_tile):
    """Each image as its special tokens, `tokens_per_tile` <IMG_CONTEXT> for each of its tiles between two marks."""
    remaining, found = iter(tiles), []
    for part in parts:
        if part[1] == IMAGE_MARK:
            tokens = ["<img>"] + [IMAGE_TOKEN] * (next(remaining) * tokens_per_tile) + ["</img>"]
            found += [(None, token, False) for token in tokens]
        else:
            found.append(part)
    return found


def render(turns, system="", tiles=(), tokens_per_tile=0, tokenizer=None):
    """A conversation as parts [(text or None, special token or None, is_answer)].

    Args:
      turns: ((question, answer), ...); the last answer may be None, to be generated.
      system: the system message; empty = the template's own.
      tiles: number of tiles of each image, in order; each image takes one `<image>` mark.
      tokenizer: whose chat template it is; without one it is InternLM2's.
    Raises:
      UserError: more or fewer marks than images, or a template that cannot be used.
    """
    turns = with_image_marks(turns, len(tiles))
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    parts = chat_template.parts(tokenizer, turns, system) if has_template else internlm2_parts(turns, system)
    return with_image_tokens(parts, tiles, tokens_per_tile)


def encode_conversation(tokenizer, turns, system="", tiles=(), tokens_per_tile=0):
    """Ids of a conversation by the tokenizer's template; supervised are each answer and its end token.

    InternLM2's template begins with `<s>`; another one says itself what it begins with. In training (every answer
    given) each turn's text is stripped, as InternVL's preprocessing does.
    """
    if all(answer is not None for _, answer in turns):
        turns = [(question.strip(), answer.strip()) for question, answer in turns]
    tokens = _first(tokenizer)
    supervised = [False] * len(tokens)
    parts = render(turns, system, (1,) * len(tiles), 1, tokenizer)
    for is_text, run in itertools.groupby(parts, key=lambda part: part[1] is None):
        run = list(run)
        if is_text:
            ids, answers = _encode_text(tokenizer, [(text, is_answer) for text, _, is_answer in run])
        else:
            ids, answers = [tokenizer.special(token) for _, token, _ in run], [is_answer for _, _, is_answer in run]
        tokens += ids
        supervised += answers
    return _with_tiles(tokenizer, tokens, supervised, tiles, tokens_per_tile)


def _with_tiles(tokenizer, tokens, marked, tiles, tokens_per_tile):
    """Encoded, in which each image's one token stands as often as its tiles need.

    Thousands of equal tokens are cheaper to repeat as an array than to render and encode.
    """
    tokens, marked = np.asarray(tokens, np.int32), np.asarray(marked, bool)
    if not tiles:
        return Encoded(tokens, marked)
    times = np.ones(len(tokens), np.int64)
    times[tokens == tokenizer.image_id] = np.asarray(tiles) * tokens_per_tile
    return Encoded(np.repeat(tokens, times), np.repeat(marked, times))


def _encode_text(tokenizer, parts):
    """Ids of adjacent texts [(text, is_answer)], and whether each is an answer's.

    They are encoded as one text, as the public code does: a tokenizer may treat the beginning of a text in its own way.
    """
    ids, belongs_to = tokenizer.encode_parts([text for text, _ in parts])
    return ids, [parts[index][1] for index in belongs_to]


def _first(tokenizer):
    """What stands before the rendered template."""
    return [tokenizer.bos] if tokenizer.chat_template is None and tokenizer.bos is not None else []


RANDOM = "\uf8ff"  # where the random ids of distillation go: Unicode's last private character


def encode_random_text(tokenizer, rng, count, system="", tiles=(), tokens_per_tile=0):
    """The text of distillation: `count` random ids after the images in the query, `count` in the response.

    Ids are uniform below the first special one; the rest is the template around them (paper, section 3.2).

    Returns:
      Encoded, whose `supervised` marks the random ids.
    """
    tokens = _first(tokenizer)
    random = [False] * len(tokens)
    turns = [(IMAGE_MARK * len(tiles) + RANDOM, RANDOM)]
    for text, token, _ in render(turns, system, (1,) * len(tiles), 1, tokenizer):
        pieces = [[tokenizer.special(token)]] if text is None else [tokenizer.encode(t) for t in text.split(RANDOM)]
        for i, ids in enumerate(pieces):
            drawn = rng.integers(0, tokenizer.first_special, count).tolist() if i else []
            tokens += drawn + ids
            random += [True] * len(drawn) + [False] * len(ids)
    return _with_tiles(tokenizer, tokens, random, tiles, tokens_per_tile)
