"""Greedy answers to a batch of prompts of different lengths, with the caches of both stacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.data.batch import BatchShape, Sample, make_row, stack
from hovle_jax.data.images import single_tile
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.hovle import HoVLE


@dataclasses.dataclass(frozen=True)
class Answerer:
    """What answers: a model, its parameters {'embedding', 'llm'}, and how text becomes tokens for it."""

    hovle: HoVLE
    params: dict
    tokenizer: Tokenizer
    system_message: str = ""


@functools.partial(jax.jit, static_argnames=("hovle", "max_new_tokens", "stop_ids"))
def greedy(params, batch, *, hovle, max_new_tokens, stop_ids):
    """The most likely token after another.

    Args:
      params: {'embedding', 'llm'}.
      batch: right-padded prompts, one segment a row, after the batch contract.
      hovle: the model (static).
    Returns:
      tokens [B, max_new_tokens] int32; behind a row's stop token (which is kept) stands that token again.
    """
    B, L = batch["tokens"].shape
    L_embedding = batch.get("long_tokens", batch["tokens"]).shape[1]
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


def prompt_samples(answerer: Answerer, prompts):
    """[(question, [Pillow images or arrays])] -> [Sample]. Raises UserError when marks and images disagree."""
    return [_prompt_sample(answerer, question, images) for question, images in prompts]


def _prompt_sample(answerer, question, images):
    embedding = answerer.hovle.config.embedding
    if embedding is None and images:
        raise UserError(f"this model is an LLM alone and sees no images; {len(images)} were given")
    size, tokens_per_tile = (embedding.tile_size, embedding.tokens_per_tile) if embedding else (0, 0)
    encoded = encode_conversation(
        answerer.tokenizer, [(question, None)], answerer.system_message, (1,) * len(images), tokens_per_tile
    )
    empty = np.zeros((0, size, size, 3), np.uint8)
    tiles = np.concatenate([empty, *(single_tile(image, size) for image in images)])
    return Sample(encoded.tokens, encoded.supervised, tiles)


def prompt_batch(answerer: Answerer, samples, length=None):
    """Right-padded prompts as a batch; `length` (default: the longest prompt) fixes the shape."""
    embedding = answerer.hovle.config.embedding
    if embedding is None:
        length = length or max(len(s.tokens) for s in samples)
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (len(samples), length))
        tokens = np.stack([np.pad(s.tokens, (0, length - len(s.tokens))) for s in samples])
        real = np.asarray([len(s.tokens) for s in samples])[:, None]
        return {"tokens": tokens, "positions": index, "segment_ids": (index < real).astype(np.int32)}
    shape = BatchShape(
        length=length or max(len(s.tokens) for s in samples),
        tiles=max([1] + [len(s.tiles) for s in samples]),
        tile_size=embedding.tile_size,
        tokens_per_tile=embedding.tokens_per_tile,
        expansion=embedding.stack_tokens_per_tile // embedding.tokens_per_tile,
        image_id=answerer.tokenizer.image_id,
    )
    return stack([make_row([s], shape, "images") for s in samples])


def answer(answerer: Answerer, prompts, max_new_tokens=32, batch_size=64):
    """Answers to [(question, images)], in order. Batches have one shape, so the program compiles once."""
    samples = prompt_samples(answerer, prompts)
    batch_size = min(batch_size, len(samples))
    length = max(len(s.tokens) for s in samples)
    check_lengths(answerer.hovle.config.llm, length, max_new_tokens)
    answers = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        filler = [part[-1]] * (batch_size - len(part))
        batch = prompt_batch(answerer, part + filler, length)
        tokens = greedy(
            answerer.params,
            batch,
            hovle=answerer.hovle,
            max_new_tokens=max_new_tokens,
            stop_ids=answerer.tokenizer.stop_ids,
        )
        answers += [text_of(answerer.tokenizer, row) for row in np.asarray(tokens)[: len(part)]]
    return answers


def text_of(tokenizer, tokens):
    """The answer's text up to its first stop token."""
    stops = np.flatnonzero(np.isin(tokens, tokenizer.stop_ids))
    return tokenizer.decode(tokens[: stops[0]] if len(stops) else tokens).strip()
