"""The one way from a conversation with its images to a sample: for training, answers, scores and a server.

Its settings are saved with the model (`ModelConfig`), so that a model is asked in the form that it was trained on.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np

from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.data.batch import Sample, no_tiles
from hovle_jax.data.images import Tiling, as_image
from hovle_jax.data.text.chat_template import Turns
from hovle_jax.data.text.conversation import Encoded, encode_conversation, encode_random_text
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processor:
    """How text and images become tokens and tiles.

    Attributes:
      tokenizer: with its chat template; one without has InternLM2's.
      tiling: how an image becomes tiles.
      tokens_per_tile: visual tokens of a tile, as the LLM reads them; 0 = an LLM alone, which sees no images.
      system: the system message of conversations without one; empty = the template's own.
    """

    tokenizer: Tokenizer
    tiling: Tiling = Tiling()
    tokens_per_tile: int = 0
    system: str = ""

    @classmethod
    def of(cls, model: ModelConfig, tokenizer: Tokenizer) -> "Processor":
        """The processor of a finished model."""
        if model.embedding is None:
            return cls(tokenizer, system=model.system_message)
        tiling = Tiling(model.embedding.tile_size, model.min_tiles, model.max_tiles, model.thumbnail)
        return cls(tokenizer, tiling, model.embedding.tokens_per_tile, model.system_message)

    @classmethod
    def of_run(cls, config: RunConfig, tokenizer: Tokenizer) -> "Processor":
        """The processor of a run, and so of the model that it will save."""
        return cls.of(config.model_config, tokenizer)

    def sample(
        self, turns: Turns, images: Iterable = (), system: str = "", max_tiles: Sequence[int | None] = ()
    ) -> Sample:
        """A conversation with its images.

        Args:
          turns: ((question, answer), ...); the last answer may be None, to be generated. Each `<image>` in a question
            takes one image, in order; without any mark the images come first.
          images: Pillow images or [H, W, 3] uint8; they share the tiling's `max_tiles`.
          system: replaces the processor's system message.
          max_tiles: of each image, its thumbnail not counted; None = the tiling's. Empty = None for all.
        Raises:
          UserError: more or fewer marks than images, images for an LLM alone, or a template that refuses the turns.
        """
        tiles = self.cut(images, max_tiles=max_tiles)
        encoded = self.encode(turns, tuple(map(len, tiles)), system)
        return Sample(encoded.tokens, encoded.supervised, self.joined(tiles))

    def cut(
        self, images: Iterable, sharing: int | None = None, max_tiles: Sequence[int | None] = ()
    ) -> list[np.ndarray]:
        """The tiles of each image, [n, S, S, 3] uint8.

        Args:
          sharing: how many images share the tiling's `max_tiles`; None = these.
          max_tiles: see `sample`.
        """
        if sharing is None:
            images = list(images)
            sharing = len(images)
        if sharing and not self.tokens_per_tile:
            raise UserError(f"this model is an LLM alone and sees no images; {sharing} were given")
        shared = self.tiling.shared_by(sharing)
        limited = (shared if limit is None else self.tiling.at_most(limit) for limit in max_tiles)
        return [tiling.cut(as_image(image)) for image, tiling in zip(images, limited if max_tiles else repeat(shared))]

    def joined(self, tiles: list[np.ndarray]) -> np.ndarray:
        """The tiles of several images, or of none, in one array."""
        return np.concatenate(tiles) if len(tiles) else no_tiles(self.tiling.size)

    def encode(self, turns: Turns, counts: Sequence[int] = (), system: str = "") -> Encoded:
        """The ids of a conversation whose images have `counts` tiles; see `encode_conversation`."""
        return encode_conversation(self.tokenizer, turns, system or self.system, counts, self.tokens_per_tile)

    def random_text(self, rng: np.random.Generator, count: int, counts: Sequence[int] = ()) -> Encoded:
        """The ids of distillation; see `encode_random_text`."""
        return encode_random_text(self.tokenizer, rng, count, self.system, counts, self.tokens_per_tile)
