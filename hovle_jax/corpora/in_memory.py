"""Samples from a small corpus of pictures that is kept in memory, with questions about them: easy-VQA.

What is asked about a picture is drawn anew each time it comes, so a row has a fixed number of samples.
"""

import dataclasses

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.data.batch import KINDS, BatchShape, Found, Row, Sample, caption_row, make_row
from hovle_jax.data.images import augment, single_tile
from hovle_jax.data.text.conversation import CAPTION_REQUEST, IMAGE_MARK, encode_conversation, encode_random_text
from hovle_jax.data.text.tokenizer import Tokenizer

CAPTION_REQUESTS = 0.1  # pretrain: the share of conversations that ask for the caption
MORE_WORDS = 5  # pretrain: how many words of a told caption are repeated at most
WHOLE_TEXTS = 0.02  # pretrain: the share of conversations of which every token is learned, not the answers alone


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Turns pictures into samples of one stage; `augmented` is off for held-out data."""

    config: RunConfig
    tokenizer: Tokenizer
    pictures: list = dataclasses.field(repr=False)  # grain writes every transform's repr
    augmented: bool

    @property
    def embedding(self):
        return self.config.model.embedding

    def tile(self, picture, rng, size):
        """[1, S, S, 3] uint8."""
        tiles = single_tile(picture.image, size)
        return augment(tiles[0], rng, max_shift=size // 8)[None] if self.augmented else tiles

    def questions(self, picture, rng):
        """Up to `data.turns` different questions of a picture with their answers, in random order.

        Where questions are balanced, the picture's first one was drawn already and comes first.
        """
        order = rng.permutation(len(picture.questions))
        if self.config.data.balanced:
            order = np.concatenate([[0], order[order != 0]])
        return [picture.questions[i] for i in order[: self.config.data.turns]]

    def conversation(self, turns, tiles):
        encoded = encode_conversation(
            self.tokenizer, turns, self.config.data.system_message, (1,) * len(tiles), self.embedding.tokens_per_tile
        )
        return Sample(encoded.tokens, encoded.supervised, tiles)

    def no_tiles(self):
        return np.zeros((0, self.embedding.tile_size, self.embedding.tile_size, 3), np.uint8)

    def text(self, picture, rng):
        """`pretrain`: a conversation about a picture that is told, not shown.

        Most samples teach the answers alone: what a caption implies is learned slowly beside the noise of which
        question was drawn.
        """
        asks_caption = rng.random() < CAPTION_REQUESTS
        turns = [(CAPTION_REQUEST, picture.caption)] if asks_caption else self.questions(picture, rng)
        all_tokens = rng.random() < WHOLE_TEXTS
        return self.told(turns, picture.caption, rng.integers(0, MORE_WORDS + 1), rng, all_tokens)

    def told(self, turns, caption, repeats, rng, all_tokens=False):
        """The caption's words stand in the image's place, in any order and number, as an image's tokens may do.

        The LLM so learns to find them there, wherever and however often they stand: `repeats` of them stand again.
        """
        words = self.tokenizer.encode(caption)
        words = [*words, *rng.choice(words, repeats)]
        turns = [(f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        encoded = encode_conversation(self.tokenizer, turns, self.config.data.system_message, (1,), len(words))
        tokens, supervised = encoded.tokens.copy(), encoded.supervised
        tokens[tokens == self.tokenizer.image_id] = rng.permutation(words)
        return Sample(tokens, np.ones_like(supervised) if all_tokens else supervised, self.no_tiles())

    def caption_pair(self, picture, rng):
        """`contrast`: the picture and its caption's ids."""
        clip = self.config.clip
        ids = [self.tokenizer.bos, *self.tokenizer.encode(picture.caption), clip.text.end_id]
        tiles = self.tile(picture, rng, clip.vision.image_size)
        return Sample(np.asarray(ids, np.int32), np.zeros(len(ids), bool), tiles)

    def random_text(self, picture, rng):
        """`distill`: the picture, with others up to `data.tiles` in all, and text of random ids.

        Small pictures give few visual tokens; several of them bring the share that a tiled picture would have.
        """
        data = self.config.data
        others = rng.integers(0, len(self.pictures), data.tiles - 1)
        shown = [picture, *(self.pictures[i] for i in others)]
        tiles = np.concatenate([self.tile(p, rng, self.embedding.tile_size) for p in shown])
        counts = (1,) * len(shown)
        encoded = encode_random_text(
            self.tokenizer, rng, data.random_tokens, data.system_message, counts, self.embedding.tokens_per_tile
        )
        return Sample(encoded.tokens, encoded.supervised, tiles)

    def seen(self, picture, rng):
        """`align`, `instruct`: the picture, questions about it, and a request for its caption, as one conversation."""
        turns = self.questions(picture, rng)
        if self.config.data.ask_caption and picture.caption:
            turns.append((CAPTION_REQUEST, picture.caption))
        turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        return self.conversation(turns, self.tile(picture, rng, self.embedding.tile_size))

    def longest(self, pictures):
        """A sample at least as long as any that these pictures can give, so that a misfit shows before the compile."""
        length = lambda pair: sum(len(self.tokenizer.encode(text)) for text in pair)
        pairs = sorted({pair for p in pictures for pair in p.questions}, key=length)
        picture = dataclasses.replace(
            pictures[0],
            questions=tuple(pairs[len(pairs) - self.config.data.turns :]),
            caption=max((p.caption for p in pictures), key=lambda text: len(self.tokenizer.encode(text))),
        )
        rng = np.random.default_rng(0)
        if self.config.stage == "pretrain":
            choices = (self.questions(picture, rng), [(CAPTION_REQUEST, picture.caption)])
            tellings = [self.told(turns, picture.caption, MORE_WORDS, rng) for turns in choices]
            return max(tellings, key=lambda sample: len(sample.tokens))
        return getattr(self, RECIPES[self.config.stage].make)(picture, rng)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage reads a picture corpus: the maker's method, and which pictures it needs."""

    make: str
    needs: str = ""  # 'caption' or 'questions'


RECIPES = {
    "pretrain": Recipe("text", "caption"),
    "contrast": Recipe("caption_pair", "caption"),
    "distill": Recipe("random_text"),
    "align": Recipe("seen", "caption"),
    "instruct": Recipe("seen", "questions"),
}


@dataclasses.dataclass(frozen=True)
class PictureCorpus:
    """Pictures of one split, as a corpus that `pipeline` reads."""

    pictures: list = dataclasses.field(repr=False)

    @classmethod
    def load(cls, split):
        return cls(easy_vqa.load(split))

    def texts(self):
        return easy_vqa.corpus(self.pictures)

    def rows(self, config: RunConfig, tokenizer, held_out=False):
        """-> (endless rows: grain.MapDataset of Row, Found). Raises UserError where a sample may not fit."""
        recipe, data = RECIPES[config.stage], config.data
        usable = [p for p in self.pictures if not recipe.needs or getattr(p, recipe.needs)]
        maker = SampleMaker(config, tokenizer, usable, augmented=data.augment and not held_out)
        join = _Joiner(config, tokenizer.image_id)
        join([maker.longest(usable)] * join.samples)  # raises where it does not fit
        groups = [(1.0, usable)]
        if data.balanced:
            groups = easy_vqa.balance_groups(usable, data.negated_share)
        shuffled = [grain.MapDataset.source(group).seed(config.seed).shuffle().repeat() for _, group in groups]
        dataset = grain.MapDataset.mix(shuffled, [weight for weight, _ in groups])
        dataset = dataset.random_map(getattr(maker, recipe.make))
        return dataset.batch(join.samples, drop_remainder=True, batch_fn=join), Found(len(usable))


@dataclasses.dataclass(frozen=True)
class _Joiner:
    """Samples -> Row."""

    config: RunConfig
    image_id: int

    @property
    def samples(self):
        """How many a row has."""
        return 1 if KINDS[self.config.stage] == "captions" else max(self.config.data.samples_per_row, 1)

    def __call__(self, samples):
        kind = KINDS[self.config.stage]
        if kind == "captions":
            text = self.config.clip.text
            return Row(caption_row(samples[0], text.context, text.end_id), (), 1)
        shape = BatchShape.of(self.config.data, self.config.model.embedding, self.image_id)
        return Row(make_row(samples, shape, kind), (), len(samples))
