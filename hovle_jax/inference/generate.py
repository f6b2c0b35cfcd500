"""Greedy answers to a batch of prompts of different lengths, with the caches of both stacks."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Params
from hovle_jax.data.batch import BatchShape, Sample, pack_row, stack
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.streams import Stream, embedding_stream


@dataclasses.dataclass(frozen=True)
class Answerer:
    """What answers: a model, its parameters {'embedding', 'llm'}, and how text and images become tokens for it."""

    hovle: HoVLE
    params: dict
    processor: Processor

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
      turns: ((question, answer), ...), the last answer None. Each `<image>` in a question takes one image, in order;
        without any mark they come first.
      images: Pillow images or [H, W, 3] uint8.
      system: the system message; empty = the model's own.
      max_tiles: of each image, or None for the model's own; empty = None for all.
    """

    turns: tuple[tuple[str, str | None], ...]
    images: tuple = ()
    system: str = ""
    max_tiles: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, question: str, *images) -> "Prompt":
        """One question about images."""
        return cls(((question, None),), images)


@functools.partial(jax.jit, static_argnames=("hovle", "max_new_tokens", "stop_ids"))
def greedy(params: Params, batch: dict, *, hovle: HoVLE, max_new_tokens: int, stop_ids: tuple[int, ...]) -> jax.Array:
    """The most likely token after another.

    Args:
      params: {'embedding', 'llm'}.
      batch: right-padded prompts, one segment a row, after the batch contract.
      hovle: the model (static).
    Returns:
      tokens [B, max_new_tokens] int32; after a row's stop token (which is kept) that token is repeated.
    """
    B, L = batch["tokens"].shape
    L_embedding = embedding_stream(batch).tokens.shape[1]
    cache = hovle.empty_cache(B, L + max_new_tokens, L_embedding + max_new_tokens, hovle.execution.dtype)
    logits, cache = hovle.prefill(params, batch, cache)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def is_stop(token):
        return jnp.any(token[:, None] == stops, axis=1)

    def unfinished(carry):
        step, _, token, _ = carry
        return (step < max_new_tokens) & ~jnp.all(is_stop(token))

    def one_more(carry):
        step, tokens, token, cache = carry
        active = ~is_stop(token)
        logits, cache = hovle.decode(params, token, active, cache)
        token = jnp.where(active, jnp.argmax(logits, axis=-1).astype(jnp.int32), token)
        return step + 1, tokens.at[:, step].set(token), token, cache

    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jnp.broadcast_to(token[:, None], (B, max_new_tokens)).astype(jnp.int32)
    step, tokens, token, _ = jax.lax.while_loop(unfinished, one_more, (jnp.int32(1), tokens, token, cache))
    # All rows ended early: the places that were not reached repeat each row's stop token.
    return jnp.where(jnp.arange(max_new_tokens)[None] < step, tokens, token[:, None])


def prompt_samples(answerer: Answerer, prompts: Sequence[Prompt]) -> list[Sample]:
    """The tokens and tiles of each prompt. Raises UserError when marks and images disagree."""
    return [answerer.processor.sample(p.turns, p.images, p.system, p.max_tiles) for p in prompts]


def prompt_batch(
    answerer: Answerer, samples: list[Sample], length: int | None = None, tiles: int | None = None
) -> dict:
    """Right-padded prompts as a batch, one a row.

    Args:
      length, tiles: of a row, which fix the batch's shape; None = the most that one of the prompts has.
    """
    length = length or max(len(s.tokens) for s in samples)
    if answerer.hovle.config.embedding is None:
        return stack([_text_row(sample, length) for sample in samples])
    shape = row_shape(answerer, length, tiles or most_tiles(samples))
    return stack([pack_row([sample], shape).image_fields() for sample in samples])


def row_shape(answerer: Answerer, length: int, tiles: int) -> BatchShape:
    """The shape of a row of so many tokens and tiles, for a model with an embedding."""
    embedding = answerer.hovle.config.embedding
    assert embedding is not None, "an LLM alone"
    return BatchShape(
        length=length,
        tiles=tiles,
        tile_size=embedding.tile_size,
        tokens_per_tile=embedding.tokens_per_tile,
        expansion=embedding.stack_tokens_per_tile // embedding.tokens_per_tile,
        image_id=answerer.tokenizer.image_id,
    )


def most_tiles(samples: list[Sample]) -> int:
    """The most tiles that one of the samples has, and no less than 1."""
    return max([1] + [len(s.tiles) for s in samples])


def _text_row(sample, length):
    n = len(sample.tokens)
    index = np.arange(length, dtype=np.int32)
    return Stream(np.pad(sample.tokens, (0, length - n)), index, (index < n).astype(np.int32)).fields()


def answer(answerer: Answerer, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[str]:
    """The answer to each prompt, at least one. Batches have one shape, so the program compiles once.

    Raises:
      UserError: marks and images disagree, or a prompt with its answer exceeds the LLM's positions.
    """
    samples = prompt_samples(answerer, prompts)
    longest = max(samples, key=lambda sample: len(sample.tokens))
    check_lengths(answerer.hovle.config.llm, len(longest.tokens), max_new_tokens, len(longest.tiles))
    shape = len(longest.tokens), most_tiles(samples)
    return answer_samples(answerer, samples, max_new_tokens, min(batch_size, len(samples)), *shape)


def answer_samples(
    answerer: Answerer, samples: list[Sample], max_new_tokens: int, batch_size: int, length: int, tiles: int
) -> list[str]:
    """The answer to each prompt, in batches of `batch_size` rows of `length` tokens and `tiles` tiles.

    These numbers fix the program: calls that agree in them compile once. The last batch is filled up.
    """
    answers = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        filler = [part[-1]] * (batch_size - len(part))
        batch = prompt_batch(answerer, part + filler, length, tiles)
        tokens = greedy(
            answerer.params,
            batch,
            hovle=answerer.hovle,
            max_new_tokens=max_new_tokens,
            stop_ids=answerer.tokenizer.stop_ids,
        )
        answers += [text_of(answerer.tokenizer, row) for row in np.asarray(tokens)[: len(part)]]
    return answers


def text_of(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The answer's text up to its first stop token."""
    stops = np.flatnonzero(np.isin(tokens, tokenizer.stop_ids))
    return tokenizer.decode(tokens[: stops[0]] if len(stops) else tokens).strip()
