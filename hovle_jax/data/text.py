"""The chat template of InternLM2, as ids. Special tokens enter through it alone, never out of a user's text."""

import dataclasses
import itertools

import numpy as np

from hovle_jax.errors import UserError

IMAGE_MARK = "<image>"  # in a conversation's text; becomes <img>, the image's tokens, </img>
DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids [L] int32, and for each whether a model is trained to produce it (bool [L])."""

    tokens: np.ndarray
    supervised: np.ndarray


def render(turns, system="", tiles=(), tokens_per_tile=0):
    """The template as parts: [(text or None, special token or None, is_answer)], `<s>` not included.

    Args:
      turns: ((question, answer), ...); the last answer may be None, to be generated.
      system: the system message; empty = InternVL's own.
      tiles: number of tiles of each image, in order; each takes one `<image>` mark. Where the first question has
        no mark at all, one for each image is put in front of it.
    Raises:
      UserError: more or fewer marks than images.
    """
    turns = list(turns)
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if tiles and not marks:
        turns[0] = ((IMAGE_MARK + "\n") * len(tiles) + turns[0][0], turns[0][1])
        marks = len(tiles)
    if marks != len(tiles):
        raise UserError(
            f"the prompt has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} and {len(tiles)} "
            f"image{'s were' if len(tiles) != 1 else ' was'} given; give one image for each mark"
        )
    remaining = iter(tiles)
    parts = [(None, "<|im_start|>", False), ("system\n" + (system or DEFAULT_SYSTEM), None, False)]
    parts += [(None, "<|im_end|>", False)]
    for question, answer in turns:
        parts += [(None, "<|im_start|>", False)]
        pieces = ("user\n" + question).split(IMAGE_MARK)
        parts += [(pieces[0], None, False)]
        for piece in pieces[1:]:
            count = next(remaining) * tokens_per_tile
            parts += [(None, "<img>", False)] + [(None, "<IMG_CONTEXT>", False)] * count + [(None, "</img>", False)]
            parts += [(piece, None, False)]
        parts += [(None, "<|im_end|>", False), (None, "<|im_start|>", False), ("assistant\n", None, False)]
        if answer is not None:
            parts += [(answer, None, True), (None, "<|im_end|>", True)]
    return parts


def render_text(turns, system="", tiles=(), tokens_per_tile=0):
    """The template as one string, special tokens by name."""
    return "".join(text if token is None else token for text, token, _ in render(turns, system, tiles, tokens_per_tile))


def encode_conversation(tokenizer, turns, system="", tiles=(), tokens_per_tile=0):
    """Ids of a conversation, `<s>` first; supervised are each answer and its `<|im_end|>`.

    In training (every answer given) each turn's text is stripped, as InternVL's preprocessing does.
    """
    if all(answer is not None for _, answer in turns):
        turns = [(question.strip(), answer.strip()) for question, answer in turns]
    tokens, supervised = [tokenizer.bos], [False]
    parts = render(turns, system, tiles, tokens_per_tile)
    for is_text, run in itertools.groupby(parts, key=lambda part: part[1] is None):
        run = list(run)
        if is_text:
            ids, answers = _encode_text(tokenizer, [(text, is_answer) for text, _, is_answer in run])
        else:
            ids, answers = [tokenizer.special(token) for _, token, _ in run], [is_answer for _, _, is_answer in run]
        tokens += ids
        supervised += answers
    return Encoded(np.asarray(tokens, np.int32), np.asarray(supervised, bool))


def _encode_text(tokenizer, parts):
    """Ids of adjacent texts [(text, is_answer)], and whether each is an answer's.

    They are encoded as one text, as the public code does: a tokenizer may treat the beginning of a text in its own way.
    Where one part ends is told by the number of ids of what stands before.
    """
    ids = tokenizer.encode("".join(text for text, _ in parts))
    ends = [len(tokenizer.encode("".join(text for text, _ in parts[:count]))) for count in range(1, len(parts))]
    answers = np.zeros(len(ids), bool)
    for (_, is_answer), start, end in zip(parts, [0, *ends], [*ends, len(ids)], strict=True):
        answers[start:end] = is_answer
    return ids, answers.tolist()


def encode_random_text(tokenizer, rng, count, system="", tiles=(), tokens_per_tile=0):
    """The text of distillation: `count` random ids behind the image in the query, `count` in the response.

    Ids are uniform below the first special one; the rest is the template around them (paper, section 3.2).

    Returns:
      Encoded, whose `supervised` marks the random ids.
    """
    tokens, random = [tokenizer.bos], [False]
    for text, token, is_answer in render([(IMAGE_MARK * len(tiles), "")], system, tiles, tokens_per_tile):
        ids = [tokenizer.special(token)] if token is not None else tokenizer.encode(text)
        begins_query_end = token == "<|im_end|>" and tokens.count(tokenizer.special("<|im_end|>")) == 1
        if begins_query_end or (is_answer and token is None):
            drawn = rng.integers(0, tokenizer.first_special, count).tolist()
            tokens += drawn
            random += [True] * count
        tokens += ids
        random += [False] * len(ids)
    return Encoded(np.asarray(tokens, np.int32), np.asarray(random, bool))
