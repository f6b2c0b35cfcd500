"""easy-VQA as a corpus: its images are kept in memory, and conversations about them are drawn from its questions.

Each time an image is used its questions are drawn anew, so a row has a fixed number of samples.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.data.augmentation import shifted
from hovle_jax.data.batch import HELD_OUT_SEED, CorpusSummary, Row, Sample
from hovle_jax.data.kinds import CAPTIONS, CONVERSATIONS, RANDOM_TEXT, TEXT, Kind
from hovle_jax.data.kinds.captions import pair
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.conversation import CAPTION_REQUEST, IMAGE_MARK
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError

CAPTION_REQUESTS = 0.1  # text: the share of conversations that ask for the caption
MORE_WORDS = 5  # text: at most so many of the caption's words are repeated in the image's place
WHOLE_TEXTS = 0.02  # text: the share of conversations in which every token is learned, not only the answers


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Turns easy-VQA's examples into samples; `augmented` is off for held-out data."""

    config: RunConfig
    tokenizer: Tokenizer
    examples: list[easy_vqa.Example] = dataclasses.field(repr=False)  # grain writes every transform's repr
    augmented: bool

    @functools.cached_property
    def processor(self) -> Processor:
        """The run's."""
        return Processor.of_run(self.config, self.tokenizer)

    def image(self, example: easy_vqa.Example, rng: np.random.Generator) -> np.ndarray:
        """[64, 64, 3] uint8, flipped and shifted at random if `augmented`."""
        return shifted(example.image, rng, max_shift=len(example.image) // 8) if self.augmented else example.image

    def questions(self, example: easy_vqa.Example, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Up to `easy_vqa.turns` different questions of an example with their answers, in random order.

        If questions are balanced, the example's first one has been drawn already and comes first.
        """
        order = rng.permutation(len(example.questions))
        if self.config.easy_vqa.balanced:
            order = np.concatenate([[0], order[order != 0]])
        return [example.questions[i] for i in order[: self.config.easy_vqa.turns]]

    def text(self, example: easy_vqa.Example, rng: np.random.Generator) -> Sample:
        """A conversation about an image that its caption describes, without the image.

        Most samples teach only the answers: the random questions are noise, beside which what a caption implies would
        be learned slowly.
        """
        asks_caption = rng.random() < CAPTION_REQUESTS
        turns = [(CAPTION_REQUEST, example.caption)] if asks_caption else self.questions(example, rng)
        all_tokens = rng.random() < WHOLE_TEXTS
        return self.described(turns, example.caption, int(rng.integers(0, MORE_WORDS + 1)), rng, all_tokens)

    def described(
        self,
        turns: list[tuple[str, str]],
        caption: str,
        repeats: int,
        rng: np.random.Generator,
        all_tokens: bool = False,
    ) -> Sample:
        """A conversation with the caption's words in the image's place, shuffled, and `repeats` of them repeated.

        So the LLM learns to find a word there wherever and however often it occurs, as it may among visual tokens.
        """
        words = self.tokenizer.encode(caption)
        words = [*words, *rng.choice(words, repeats)]
        turns = [(f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        token_per_word = dataclasses.replace(self.processor, tokens_per_tile=len(words))
        encoded = token_per_word.encode(turns, (1,))
        tokens, supervised = encoded.tokens.copy(), encoded.supervised
        tokens[tokens == self.tokenizer.image_id] = rng.permutation(words)
        return Sample(tokens, np.ones_like(supervised) if all_tokens else supervised, self.processor.joined([]))

    def caption_pair(self, example: easy_vqa.Example, rng: np.random.Generator) -> Sample:
        """The image and the ids of its caption."""
        shape = CAPTIONS.shape(self.config)
        tile = shape.resizing.tile(self.image(example, rng))
        return pair(tile[None], shape.ids(self.tokenizer, example.caption))

    def random_text(self, example: easy_vqa.Example, rng: np.random.Generator) -> Sample:
        """The image, others up to `data.tiles` in all, and text of random ids.

        A small image has few visual tokens; several of them give visual tokens the share they have in a tiled image.
        """
        data = self.config.data
        others = rng.integers(0, len(self.examples), data.tiles - 1)
        images = [self.image(p, rng) for p in (example, *(self.examples[i] for i in others))]
        tiles = self.processor.cut(images)
        encoded = self.processor.random_text(rng, data.random_tokens, tuple(map(len, tiles)))
        return Sample(encoded.tokens, encoded.supervised, self.processor.joined(tiles))

    def shown(self, example: easy_vqa.Example, rng: np.random.Generator) -> Sample:
        """A conversation about the image: questions, and a request for its caption."""
        turns = self.questions(example, rng)
        if self.config.easy_vqa.ask_caption and example.caption:
            turns.append((CAPTION_REQUEST, example.caption))
        turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        return self.processor.sample(turns, [self.image(example, rng)])

    def longest(self, recipe: "Recipe", examples: list[easy_vqa.Example]) -> Sample:
        """A sample at least as long as any of these examples can give, to find before the compile what does not fit."""
        length = lambda pair: sum(len(self.tokenizer.encode(text)) for text in pair)
        pairs = sorted({pair for p in examples for pair in p.questions}, key=length)
        example = dataclasses.replace(
            examples[0],
            questions=tuple(pairs[len(pairs) - self.config.easy_vqa.turns :]),
            caption=max((p.caption for p in examples), key=lambda text: len(self.tokenizer.encode(text))),
        )
        rng = np.random.default_rng(0)
        if not recipe.describes:
            return getattr(self, recipe.make)(example, rng)
        choices = (self.questions(example, rng), [(CAPTION_REQUEST, example.caption)])
        samples = [self.described(turns, example.caption, MORE_WORDS, rng) for turns in choices]
        return max(samples, key=lambda sample: len(sample.tokens))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How samples of a kind of batch are made from examples.

    Attributes:
      make: a method of SampleMaker.
      needs: what an example must have: 'caption', 'questions' or nothing.
      describes: whether the caption's words, a random number of them, take the image's place.
    """

    make: str
    needs: str = ""
    describes: bool = False

    def takes(self, example: easy_vqa.Example, only_captioned: bool) -> bool:
        """Whether this example is used."""
        return not self.needs or bool(example.caption if only_captioned else getattr(example, self.needs))


RECIPES = {
    TEXT: Recipe("text", "caption", describes=True),
    CAPTIONS: Recipe("caption_pair", "caption"),
    RANDOM_TEXT: Recipe("random_text"),
    CONVERSATIONS: Recipe("shown", "questions"),
}


@dataclasses.dataclass(frozen=True)
class InMemoryCorpus:
    """The examples of one split as a `pipeline.Corpus`."""

    examples: list[easy_vqa.Example] = dataclasses.field(repr=False)

    @classmethod
    def load(cls, split: str) -> "InMemoryCorpus":
        """The official split. Raises UserError if there is no such split."""
        return cls(easy_vqa.load(split))

    def texts(self) -> Iterator[str]:
        """Its questions, answers and captions."""
        return easy_vqa.corpus(self.examples)

    def rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> tuple[grain.MapDataset, CorpusSummary]:
        """-> (endless rows: a MapDataset of Row, summary). Raises UserError if a sample may not fit."""
        usable, make, join, samples = self._makers(config, kind, tokenizer, config.data.augment)
        choice = config.easy_vqa
        groups = easy_vqa.balance_groups(usable, choice.negated_share) if choice.balanced else [(1.0, usable)]
        shuffled = [grain.MapDataset.source(group).seed(config.seed).shuffle().repeat() for _, group in groups]
        dataset = grain.MapDataset.mix(shuffled, [weight for weight, _ in groups])
        dataset = dataset.random_map(make)
        return dataset.batch(samples, drop_remainder=True, batch_fn=join), CorpusSummary(len(usable))

    def held_out_rows(self, config: RunConfig, kind: Kind, tokenizer: Tokenizer) -> grain.MapDataset:
        """Every example once, in order, never augmented, with the same questions for every seed."""
        usable, make, join, samples = self._makers(config, kind, tokenizer, augmented=False)
        dataset = grain.MapDataset.source(usable).seed(HELD_OUT_SEED).random_map(make)
        return dataset.batch(samples, drop_remainder=False, batch_fn=join)

    def _makers(self, config, kind, tokenizer, augmented):
        """-> (usable examples, example -> sample, samples -> Row, samples per row)."""
        if kind not in RECIPES:
            raise UserError(f"easy_vqa gives no batches of {kind.name}; set data.source to data that does")
        recipe, samples = RECIPES[kind], max(kind.limits(config).samples, 1)
        usable = [p for p in self.examples if recipe.takes(p, config.easy_vqa.only_captioned)]
        maker = SampleMaker(config, tokenizer, usable, augmented)
        join = _Joiner(kind, kind.shape(config, tokenizer))
        join([maker.longest(recipe, usable)] * samples)  # raises if it does not fit
        return usable, getattr(maker, recipe.make), join, samples


@dataclasses.dataclass(frozen=True)
class _Joiner:
    """Samples -> Row."""

    kind: Kind
    shape: Any

    def __call__(self, samples):
        return Row(self.kind.row(samples, self.shape), (), len(samples))
