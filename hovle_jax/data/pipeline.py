"""What each stage reads: batch = f(seed, step), on grain.

A sample is made from (a picture, a random generator of its own); grain derives that generator from the seed and the
sample's place in the global order alone, so a batch does not depend on workers or on where a run was resumed.
"""

import dataclasses
import functools

import grain
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.data import easy_vqa
from hovle_jax.data.batch import BatchShape, Sample, collate, collate_captions
from hovle_jax.data.images import augment, single_tile
from hovle_jax.data.text import IMAGE_MARK, encode_conversation, encode_random_text
from hovle_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from hovle_jax.errors import UserError

CAPTION_REQUEST = "describe the picture."
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
    """How a stage reads a picture corpus: the maker's method, which pictures it needs, the kind of batch."""

    make: str
    needs: str  # 'caption', 'questions' or nothing
    kind: str


RECIPES = {
    "pretrain": Recipe("text", "caption", "text"),
    "contrast": Recipe("caption_pair", "caption", "captions"),
    "distill": Recipe("random_text", "", "distill"),
    "align": Recipe("seen", "caption", "images"),
    "instruct": Recipe("seen", "questions", "images"),
}


def build_dataset(config: RunConfig, tokenizer, pictures, held_out=False):
    """An endless, randomly accessible data set of batches: dataset[step].

    Args:
      pictures: of the training split, or of another one with held_out=True (no augmentation).
    Returns:
      grain.MapDataset of dicts of numpy arrays.
    """
    recipe, data = RECIPES[config.stage], config.data
    usable = [p for p in pictures if not recipe.needs or getattr(p, recipe.needs)]
    maker = SampleMaker(config, tokenizer, usable, augmented=data.augment and not held_out)
    if recipe.kind == "captions":
        per_batch = data.batch_size
        join = functools.partial(collate_captions, context=config.clip.text.context, end_id=config.clip.text.end_id)
    else:
        per_batch = data.batch_size * data.samples_per_row
        shape = BatchShape.of(data, config.model.embedding, tokenizer.image_id)
        join = functools.partial(collate, shape=shape, kind=recipe.kind, samples_per_row=data.samples_per_row)
    join([maker.longest(usable)] * per_batch)  # raises where it does not fit
    groups = [(1.0, usable)]
    if data.balanced:
        groups = LOADERS[data.source].balance_groups(usable, data.negated_share)
    shuffled = [grain.MapDataset.source(group).seed(config.seed).shuffle().repeat() for _, group in groups]
    dataset = grain.MapDataset.mix(shuffled, [weight for weight, _ in groups])
    dataset = dataset.random_map(getattr(maker, recipe.make))
    return dataset.batch(per_batch, drop_remainder=True, batch_fn=join)


def iterate(dataset, first_step):
    """Batches from `first_step` on, prepared ahead in a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset[first_step:].to_iter_dataset(options))


LOADERS = {"easy_vqa": easy_vqa}


def load_pictures(config: RunConfig, split):
    """Raises UserError for a source or split that does not exist."""
    if config.data.source not in LOADERS:
        raise UserError(f"data.source={config.data.source!r} is not known; use one of {', '.join(LOADERS)}")
    return LOADERS[config.data.source].load(split)


def train_tokenizer(config: RunConfig, pictures):
    """The tokenizer of a corpus: its text, and the template's role names so that each is one piece."""
    lines = list(LOADERS[config.data.source].corpus(pictures))
    extra = ["system\n" + config.data.system_message, "user\n", "assistant\n", CAPTION_REQUEST]
    return SentencePieceTokenizer.train(lines + extra * (len(lines) // 20), config.tokenizer.vocab_size)
