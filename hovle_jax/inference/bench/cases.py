"""What is measured: requests of one size, by so many streams at once; all that can be wrong is said here."""

import dataclasses
from collections.abc import Sequence

from hovle_jax.errors import UserError
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig

TABLE_6 = (336, 448)  # pixels along a side of the paper's tiles


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How much is asked; as it stands, the paper's table 6 and a load profile.

    Attributes:
      streams: how many answers at once, one number after another.
      text_tokens, new_tokens: of each request, and of its answer, which never ends earlier.
      answers: that are measured of each number of streams, at least; no fewer than there are streams.
    """

    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    text_tokens: int = 256
    new_tokens: int = 120
    answers: int = 8


QUICK = Protocol(streams=(1, 2), text_tokens=16, new_tokens=8, answers=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests that are answered side by side.

    Attributes:
      streams: how many at once.
      tile_size: pixels along a side of each request's one tile; 0 = text alone.
      text_tokens, new_tokens: see `Protocol`.
    """

    streams: int
    tile_size: int
    text_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        """In a line of progress."""
        tile = f", tile of {self.tile_size} pixels" if self.tile_size else ""
        return f"{self.streams} stream{'s' * (self.streams != 1)}{tile}"


def with_tile_size(model: HoVLEConfig, tile_size: int) -> HoVLEConfig:
    """The model reading tiles of another size, its learned positions resized; 0 changes nothing."""
    embedding = model.embedding
    if embedding is None or tile_size in (0, embedding.tile_size):
        return model
    return dataclasses.replace(model, embedding=dataclasses.replace(embedding, force_image_size=tile_size))


def plan(model: HoVLEConfig, protocol: Protocol, tile_sizes: Sequence[int] = ()) -> tuple[Case, ...]:
    """One stream for each tile size, then all numbers of streams at the model's own tile size.

    Args:
      tile_sizes: none = the paper's two where one of them is the model's own, else that one. An LLM alone has none.
    Raises:
      UserError: sizes that the model cannot read, or requests that are too long for it.
    """
    sizes = _tile_sizes(model.embedding, tile_sizes)
    own = model.embedding.tile_size if model.embedding and model.embedding.tile_size in sizes else sizes[-1]
    for size in sizes:
        _check(with_tile_size(model, size), size, protocol)
    both = [*((1, size) for size in sizes), *((n, own) for n in sorted(protocol.streams))]
    return tuple(Case(n, size, protocol.text_tokens, protocol.new_tokens) for n, size in dict.fromkeys(both))


def _tile_sizes(embedding: EmbeddingConfig | None, asked: Sequence[int]) -> tuple[int, ...]:
    if embedding is None:
        if asked:
            raise UserError(
                f"--tile_sizes={_listed(asked)}: this model is an LLM alone and sees no tiles; leave it out"
            )
        return (0,)
    return tuple(asked) or (TABLE_6 if embedding.tile_size in TABLE_6 else (embedding.tile_size,))


def _check(model, size, protocol):
    try:
        model.check()
    except UserError as error:
        raise UserError(f"--tile_sizes has {size}: {error}") from None
    visual = model.embedding.tokens_per_tile if model.embedding else 0
    check_lengths(model.llm, visual + protocol.text_tokens, protocol.new_tokens, tiles=int(visual > 0))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """'1,8,32' of a flag -> (1, 8, 32). Raises UserError where one is no number from 1 on."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--{flag}={text}: give whole numbers from 1 on, separated by commas, as --{flag}=1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))


def _listed(sizes):
    return ",".join(map(str, sizes))
