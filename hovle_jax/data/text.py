"""Tokenizers and the chat template of InternLM2.

Special tokens are never parsed out of a user's text: they enter as ids, through the template alone.
"""

import dataclasses
import io
import itertools
import pathlib

import numpy as np

from hovle_jax.config import NUM_ADDED_TOKENS
from hovle_jax.errors import UserError

# At the top of the vocabulary, in the order of the public checkpoints (InternLM2: 92542 to 92552).
ADDED_TOKENS = (
    "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>",
    "</box>",
)  # fmt: skip
assert len(ADDED_TOKENS) == NUM_ADDED_TOKENS
IMAGE_MARK = "<image>"  # in a conversation's text; becomes <img>, the image's tokens, </img>
DEFAULT_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


class Tokenizer:
    """A SentencePiece model with the chat and image tokens behind its own ids.

    Attributes:
      vocab_size: all ids.
      first_special: the first chat token's id; ids below it are text.
    """

    bos, eos = 1, 2

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.first_special = self._pieces.vocab_size()
        self.vocab_size = self.first_special + len(ADDED_TOKENS)
        self._special = {token: self.first_special + i for i, token in enumerate(ADDED_TOKENS)}
        self._special |= {"<s>": self.bos, "</s>": self.eos}
        self._names = {i: token for token, i in self._special.items()}
        self.stop_ids = (self._special["<|im_end|>"], self.eos)
        self.image_id = self._special["<IMG_CONTEXT>"]

    @classmethod
    def load(cls, path):
        """Raises UserError when the file is missing."""
        path = pathlib.Path(path)
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; point tokenizer.path at a SentencePiece model")
        return cls(path.read_bytes())

    @classmethod
    def train(cls, lines, vocab_size):
        """A BPE model with byte fallback over `lines`; `vocab_size` counts the added tokens too."""
        import sentencepiece

        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size - len(ADDED_TOKENS),
            byte_fallback=True,
            character_coverage=1.0,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            user_defined_symbols=["\n"],  # a boundary: a role's header is never merged with what follows it
            num_threads=1,
            minloglevel=2,
        )
        return cls(out.getvalue())

    def special(self, token):
        """The id of '<s>', '</s>' or an added token."""
        return self._special[token]

    def encode(self, text):
        """Ids of plain text; special tokens written in it are ordinary characters."""
        return self._pieces.encode(text)

    def decode(self, ids, skip_special=True):
        """Text of ids; special tokens are left out or written by name. Reserved ids (none in ours) give nothing."""
        parts = []
        for special, run in itertools.groupby(map(int, ids), key=lambda i: i in self._names):
            if not special:
                parts.append(self._pieces.decode([i for i in run if i < self.first_special]))
            elif not skip_special:
                parts.extend(self._names[i] for i in run)
        return "".join(parts)

    def pieces(self, ids):
        """Each id's own piece, for showing: ['▁a', '▁blue', '<img>', ...]."""
        return [
            self._names.get(i) or (self._pieces.id_to_piece(i) if i < self.first_special else f"<id {i}>")
            for i in map(int, ids)
        ]


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
    for text, token, is_answer in render(turns, system, tiles, tokens_per_tile):
        ids = [tokenizer.special(token)] if token is not None else tokenizer.encode(text)
        tokens += ids
        supervised += [is_answer] * len(ids)
    return Encoded(np.asarray(tokens, np.int32), np.asarray(supervised, bool))


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
