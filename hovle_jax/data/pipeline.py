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
from hovle_jax.data.text import IMAGE_MARK, Tokenizer, encode_conversation, encode_random_text
from hovle_jax.errors import UserError

CAPTION_REQUEST = "describe the picture."
BALANCE = {"affirmed": 2, "denied": 2, "open": 1}
WHOLE_TEXTS = 0.02  # pretrain: the share of conversations of which every token is learned, not the answers alone


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Turns pictures into samples of one stage; `augmented` is off for held-out data."""

    config: RunConfig
    tokenizer: Tokenizer
    pictures: list
    augmented: bool

    @property
    def embedding(self):
        return self.config.model.embedding

    def tile(self, picture, rng, size):
        """[1, S, S, 3] uint8."""
        tiles = single_tile(picture.image, size)
        return augment(tiles[0], rng, max_shift=size // 8)[None] if self.augmented else tiles

    def questions(self, picture, rng, count):
        """Up to `count` different questions of a picture, in random order; see `DataConfig.balanced`."""
        pairs = picture.questions
        weights = np.ones(len(pairs))
        if self.config.data.balanced:
            kinds = [easy_vqa.reply_kind(*pair) for pair in pairs]
            weights = np.asarray([BALANCE[kind] / kinds.count(kind) for kind in kinds])
        chosen = rng.choice(len(pairs), min(count, len(pairs)), replace=False, p=weights / weights.sum())
        return [pairs[i] for i in chosen]

    def conversation(self, turns, tiles):
        encoded = encode_conversation(
            self.tokenizer, turns, self.config.data.system_message, (1,) * len(tiles), self.embedding.tokens_per_tile
        )
        return Sample(encoded.tokens, encoded.supervised, tiles)

    def no_tiles(self):
        return np.zeros((0, self.embedding.image_size, self.embedding.image_size, 3), np.uint8)

    def text(self, picture, rng):
        """`pretrain`: a conversation about a picture that is told, not shown.

        Most samples teach the answers alone: what a caption implies is learned slowly beside the noise of which
        question was drawn.
        """
        turns = self.questions(picture, rng, self.config.data.turns)
        if picture.caption and rng.random() < 0.1:
            turns = [(CAPTION_REQUEST, picture.caption)]
        return self.told(turns, picture.caption, all_tokens=rng.random() < WHOLE_TEXTS)

    def told(self, turns, caption, all_tokens=False):
        """The caption stands where the image will be, so that the LLM learns to answer from it."""
        if caption:
            turns = [(f"{caption}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        sample = self.conversation(turns, self.no_tiles())
        return dataclasses.replace(sample, supervised=np.ones_like(sample.supervised)) if all_tokens else sample

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
        tiles = np.concatenate([self.tile(p, rng, self.embedding.image_size) for p in shown])
        counts = (1,) * len(shown)
        encoded = encode_random_text(
            self.tokenizer, rng, data.random_tokens, data.system_message, counts, self.embedding.tokens_per_tile
        )
        return Sample(encoded.tokens, encoded.supervised, tiles)

    def caption(self, picture, rng):
        """`align`: the picture and a request for its caption."""
        turns = [(f"{IMAGE_MARK}\n{CAPTION_REQUEST}", picture.caption)]
        return self.conversation(turns, self.tile(picture, rng, self.embedding.image_size))

    def question(self, picture, rng):
        """`instruct`: the picture and some of its questions, as one conversation."""
        turns = self.questions(picture, rng, self.config.data.turns)
        turns[0] = (f"{IMAGE_MARK}\n{turns[0][0]}", turns[0][1])
        return self.conversation(turns, self.tile(picture, rng, self.embedding.image_size))

    def longest(self, pictures):
        """A sample at least as long as any that these pictures can give, so that a misfit shows before the compile."""
        length = lambda pair: sum(len(self.tokenizer.encode(text)) for text in pair)
        pairs = sorted({pair for p in pictures for pair in p.questions}, key=length)
        caption = max((p.caption for p in pictures), key=lambda text: len(self.tokenizer.encode(text)))
        if self.config.stage == "pretrain":
            return self.told(pairs[-self.config.data.turns :], caption)
        picture = dataclasses.replace(pictures[0], questions=pairs[-self.config.data.turns :], caption=caption)
        return getattr(self, RECIPES[self.config.stage].make)(picture, np.random.default_rng(0))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage reads a picture corpus: the maker's method, which pictures it needs, the kind of batch."""

    make: str
    needs: str  # 'caption', 'questions' or nothing
    kind: str


RECIPES = {
    "pretrain": Recipe("text", "questions", "text"),
    "contrast": Recipe("caption_pair", "caption", "captions"),
    "distill": Recipe("random_text", "", "distill"),
    "align": Recipe("caption", "caption", "images"),
    "instruct": Recipe("question", "questions", "images"),
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
    dataset = grain.MapDataset.source(usable).seed(config.seed).shuffle().repeat()
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
    return Tokenizer.train(lines + extra * (len(lines) // 20), config.tokenizer.vocab_size)
