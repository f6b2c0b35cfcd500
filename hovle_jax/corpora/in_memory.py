"""easy-VQA as a corpus: its images in memory, and conversations about them drawn from their questions.

What is asked about an image is drawn anew each time it comes, so a row has a fixed number of samples.
"""

import dataclasses
import functools
from typing import Any

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.data.batch import HELD_OUT_SEED, Found, Row, Sample
from hovle_jax.data.images import augment, single_tile
from hovle_jax.data.kinds import CAPTIONS, CONVERSATIONS, RANDOM_TEXT, TEXT, Kind
from hovle_jax.data.kinds.captions import pair
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.conversation import CAPTION_REQUEST, IMAGE_MARK
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

CAPTION_REQUESTS = 0.1  # text: the share of conversations that ask for the caption
MORE_WORDS = 5  # text: how many words of a told caption are repeated at most
WHOLE_TEXTS = 0.02  # text: the share of conversations of which every token is learned, not the answers alone


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Turns easy-VQA's pictures into samples; `augmented` is off for held-out data."""

    config: RunConfig
    tokenizer: Tokenizer
    pictures: list = dataclasses.field(repr=False)  # grain writes every transform's repr
    augmented: bool

    @functools.cached_property
    def processor(self) -> Processor:
        return Processor.of_run(self.config, self.tokenizer)

    def image(self, picture, rng) -> np.ndarray:
        """[64, 64, 3] uint8, flipped and shifted where that is asked for."""
        return augment(picture.image, rng, max_shift=len(picture.image) // 8) if self.augmented else picture.image

    def questions(self, picture, rng) -> list:
        """Up to `easy_vqa.turns` different questions of a picture with their answers, in random order.

        Where questions are balanced, the picture's first one was drawn already and comes first.
        """
        order = rng.permutation(len(picture.questions))
        if self.config.easy_vqa.balanced:
            order = np.concatenate([[0], order[order != 0]])
        return [picture.questions[i] for i in order[: self.config.easy_vqa.turns]]

    def text(self, picture, rng) -> Sample:
        """A conversation about a picture that is told, not shown.

        Most samples teach the answers alone: what a caption implies is learned slowly beside the noise of which
        question was drawn.
        """
        asks_caption = rng.random() < CAPTION_REQUESTS
        turns = [(CAPTION_REQUEST, picture.caption)] if asks_caption else self.questions(picture, rng)
        all_tokens = rng.random() < WHOLE_TEXTS
        return self.told(turns, picture.caption, rng.integers(0, MORE_WORDS + 1), rng, all_tokens)

    def told(self, turns, caption, repeats, rng, all_tokens=False) -> Sample:
        """The caption's words stand in the image's place, in any order and number, as an image's tokens may do.

        The LLM so learns to find them there, wherever and however often they stand: `repeats` of them stand again.
        """
        words = self.tokenizer.encode(caption)
        words = [*words, *rng.choice(words, repeats)]
        turns = [(f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        one_a_word = dataclasses.replace(self.processor, tokens_per_tile=len(words))
        encoded = one_a_word.encode(turns, (1,))
        tokens, supervised = encoded.tokens.copy(), encoded.supervised
        tokens[tokens == self.tokenizer.image_id] = rng.permutation(words)
        return Sample(tokens, np.ones_like(supervised) if all_tokens else supervised, self.processor.joined([]))

    def caption_pair(self, picture, rng) -> Sample:
        """The picture and its caption's ids."""
        shape = CAPTIONS.shape(self.config)
        ids = [self.tokenizer.bos, *self.tokenizer.encode(picture.caption), shape.end_id]
        return pair(single_tile(self.image(picture, rng), shape.image_size), ids)

    def random_text(self, picture, rng) -> Sample:
        """The picture, with others up to `data.tiles` in all, and text of random ids.

        Small pictures give few visual tokens; several of them bring the share that a tiled image would have.
        """
        data = self.config.data
        others = rng.integers(0, len(self.pictures), data.tiles - 1)
        shown = [self.image(p, rng) for p in (picture, *(self.pictures[i] for i in others))]
        tiles = self.processor.cut(shown)
        encoded = self.processor.random_text(rng, data.random_tokens, tuple(map(len, tiles)))
        return Sample(encoded.tokens, encoded.supervised, self.processor.joined(tiles))

    def seen(self, picture, rng) -> Sample:
        """The picture, questions about it, and a request for its caption, as one conversation."""
        turns = self.questions(picture, rng)
        if self.config.easy_vqa.ask_caption and picture.caption:
            turns.append((CAPTION_REQUEST, picture.caption))
        turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        return self.processor.sample(turns, [self.image(picture, rng)])

    def longest(self, recipe: "Recipe", pictures) -> Sample:
        """A sample at least as long as any that these pictures can give, so that a misfit shows before the compile."""
        length = lambda pair: sum(len(self.tokenizer.encode(text)) for text in pair)
        pairs = sorted({pair for p in pictures for pair in p.questions}, key=length)
        picture = dataclasses.replace(
            pictures[0],
            questions=tuple(pairs[len(pairs) - self.config.easy_vqa.turns :]),
            caption=max((p.caption for p in pictures), key=lambda text: len(self.tokenizer.encode(text))),
        )
        rng = np.random.default_rng(0)
        if not recipe.tells:
            return getattr(self, recipe.make)(picture, rng)
        choices = (self.questions(picture, rng), [(CAPTION_REQUEST, picture.caption)])
        tellings = [self.told(turns, picture.caption, MORE_WORDS, rng) for turns in choices]
        return max(tellings, key=lambda sample: len(sample.tokens))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a kind of batch is made of pictures.

    Attributes:
      make: the maker's method.
      needs: what a picture must have: 'caption', 'questions' or nothing.
      tells: the caption stands in the image's place, in a number of words that is drawn.
    """

    make: str
    needs: str = ""
    tells: bool = False

    def takes(self, picture, only_captioned: bool) -> bool:
        """Whether samples are made of a picture."""
        return not self.needs or bool(picture.caption if only_captioned else getattr(picture, self.needs))


RECIPES = {
    TEXT: Recipe("text", "caption", tells=True),
    CAPTIONS: Recipe("caption_pair", "caption"),
    RANDOM_TEXT: Recipe("random_text"),
    CONVERSATIONS: Recipe("seen", "questions"),
}


@dataclasses.dataclass(frozen=True)
class PictureCorpus:
    """Pictures of one split, as a corpus that `pipeline` reads."""

    pictures: list = dataclasses.field(repr=False)

    @classmethod
    def load(cls, split) -> "PictureCorpus":
        return cls(easy_vqa.load(split))

    def texts(self):
        return easy_vqa.corpus(self.pictures)

    def rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> tuple:
        """-> (endless rows: grain.MapDataset of Row, Found). Raises UserError where a sample may not fit."""
        usable, make, join, samples = self._makers(config, kind, tokenizer, config.data.augment)
        choice = config.easy_vqa
        groups = easy_vqa.balance_groups(usable, choice.negated_share) if choice.balanced else [(1.0, usable)]
        shuffled = [grain.MapDataset.source(group).seed(config.seed).shuffle().repeat() for _, group in groups]
        dataset = grain.MapDataset.mix(shuffled, [weight for weight, _ in groups])
        dataset = dataset.random_map(make)
        return dataset.batch(samples, drop_remainder=True, batch_fn=join), Found(len(usable))

    def held_out_rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> grain.MapDataset:
        """Every picture once, in its order, never augmented, its questions drawn alike whatever the seed."""
        usable, make, join, samples = self._makers(config, kind, tokenizer, augmented=False)
        dataset = grain.MapDataset.source(usable).seed(HELD_OUT_SEED).random_map(make)
        return dataset.batch(samples, drop_remainder=False, batch_fn=join)

    def _makers(self, config, kind, tokenizer, augmented):
        """-> (usable pictures, picture -> sample, samples -> Row, samples of a row)."""
        if kind not in RECIPES:
            raise UserError(f"easy_vqa gives no batches of {kind.name}; set data.source to data that does")
        recipe, samples = RECIPES[kind], max(kind.limits(config).samples, 1)
        usable = [p for p in self.pictures if recipe.takes(p, config.easy_vqa.only_captioned)]
        maker = SampleMaker(config, tokenizer, usable, augmented)
        join = _Joiner(kind, kind.shape(config, tokenizer))
        join([maker.longest(recipe, usable)] * samples)  # raises where it does not fit
        return usable, getattr(maker, recipe.make), join, samples


@dataclasses.dataclass(frozen=True)
class _Joiner:
    """Samples -> Row."""

    kind: Kind
    shape: Any

    def __call__(self, samples):
        return Row(self.kind.row(samples, self.shape), (), len(samples))
