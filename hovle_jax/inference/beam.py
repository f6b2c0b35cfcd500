"""Beam search: the answers of the highest score, sum of log-probabilities / length^penalty, that a beam of K finds.

Dimension letters: B prompts, K beams, V vocabulary, T most new tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import padded_tiles
from hovle_jax.inference.generate import Answerer, Prompt, prompt_batch, prompt_samples, text_of
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.hovle import HoVLE, HoVLECache
from hovle_jax.model.streams import embedding_stream

LOW = -1e9  # the score of a beam or an answer that is not there
EARLY = (True, False, "never")
PADDED = 64  # prompts are padded to multiples of so many tokens, as each length is a program of its own


@dataclasses.dataclass(frozen=True)
class Beam:
    """How to search.

    Attributes:
      beams: K: beginnings that are kept.
      length_penalty: above 0 longer answers gain, as log-probabilities are negative (Wu et al. 2016, section 7).
      early_stopping: when to end. True: K answers are complete. False: what is begun, at its length now, would not beat
        the worst of K complete answers. 'never': not at any length either.
    """

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self):
        if self.beams < 1:
            raise UserError(f"beams={self.beams}: at least 1")
        if self.early_stopping not in EARLY:
            raise UserError(f"early_stopping={self.early_stopping!r}: one of {', '.join(map(repr, EARLY))}")


@flax.struct.dataclass
class Search:
    """Beginnings and complete answers, each the best first.

    Attributes:
      tokens, scores: [B, K, T] and [B, K]: beginnings, and their sums of log-probabilities.
      answers, answer_scores: the same of complete answers; `LOW` where there is none.
      is_open: [B] bool: whether a prompt's answers may still get better.
      length: int32 scalar: tokens of each beginning.
      cache: of B * K rows.
    """

    tokens: jax.Array
    scores: jax.Array
    answers: jax.Array
    answer_scores: jax.Array
    is_open: jax.Array
    length: jax.Array
    cache: HoVLECache


@functools.partial(jax.jit, static_argnames=("hovle", "beam", "max_new_tokens", "stop_ids"))
def search(
    params: dict, batch: dict, *, hovle: HoVLE, beam: Beam, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The best answers to right-padded prompts.

    Args:
      batch: as for `generate.greedy`.
    Returns:
      (tokens [B, K, T] int32, scores [B, K]), the best first; what comes after an answer's stop token means nothing.
    """
    B, L = batch["tokens"].shape
    room = embedding_stream(batch).tokens.shape[1] + max_new_tokens
    cache = hovle.empty_cache(B, L + max_new_tokens, room, hovle.execution.dtype)
    logits, cache = hovle.prefill(params, batch, cache)
    K, T = beam.beams, max_new_tokens
    zeros = jnp.zeros((B, K, T), jnp.int32)
    # All beams begin alike: one of them counts.
    scores = jnp.where(jnp.arange(K) == 0, 0.0, LOW) * jnp.ones((B, 1))
    begun = Search(
        zeros, scores, zeros, jnp.full((B, K), LOW), jnp.ones(B, bool), jnp.int32(0),
        jax.tree.map(functools.partial(_repeated, times=K), cache),
    )  # fmt: skip
    grow = functools.partial(_grown, beam=beam, most=T, stop_ids=stop_ids)
    first = grow(begun, jnp.repeat(logits, K, axis=0))

    def one_more(state):
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.length - 1, axis=2, keepdims=False)
        logits, cache = hovle.decode(params, last.reshape(-1), jnp.ones(B * K, bool), state.cache)
        return grow(dataclasses.replace(state, cache=cache), logits)

    done = jax.lax.while_loop(lambda state: (state.length < T) & jnp.any(state.is_open), one_more, first)
    return done.answers, done.answer_scores


def _repeated(leaf, times):
    """A cache's leaf with each row `times` times; rows are axis 1 of keys and values, axis 0 of lengths."""
    return jnp.repeat(leaf, times, axis=0 if leaf.ndim == 1 else 1)


def _taken(leaf, rows):
    return jnp.take(leaf, rows, axis=0 if leaf.ndim == 1 else 1)


def _grown(state, logits, beam, most, stop_ids):
    """Every beginning goes on with every token; the best stay. logits [B * K, V]."""
    B, K, T = state.tokens.shape
    V, length = logits.shape[-1], state.length + 1
    totals = jax.nn.log_softmax(logits).reshape(B, K, V) + state.scores[:, :, None]
    # So many that K go on even if all others end.
    count = K * (1 + max(1, len(stop_ids)))
    totals, chosen = jax.lax.top_k(totals.reshape(B, K * V), min(count, K * V))
    parents, tokens = chosen // V, (chosen % V).astype(jnp.int32)
    grown = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, state.length].set(tokens)
    ends = jnp.any(tokens[:, :, None] == jnp.asarray(stop_ids, jnp.int32), axis=-1) | (length == most)

    answers, answer_scores = _completed(state, grown, totals, ends, length, beam)
    scores, kept = jax.lax.top_k(jnp.where(ends, LOW, totals), K)
    rows = jnp.take_along_axis(parents, kept, axis=1) + K * jnp.arange(B)[:, None]
    return Search(
        tokens=jnp.take_along_axis(grown, kept[:, :, None], axis=1),
        scores=scores,
        answers=answers,
        answer_scores=answer_scores,
        is_open=state.is_open & _may_improve(scores[:, 0], answer_scores, length, most, beam),
        length=length,
        cache=jax.tree.map(functools.partial(_taken, rows=rows.reshape(-1)), state.cache),
    )


def _completed(state, grown, totals, ends, length, beam):
    """The best K of the complete answers so far and those that end now among the K best of all."""
    K = beam.beams
    is_new = ends & (jnp.arange(totals.shape[1]) < K) & state.is_open[:, None]
    new = jnp.where(is_new, totals / length.astype(jnp.float32) ** beam.length_penalty, LOW)
    scores, kept = jax.lax.top_k(jnp.concatenate([state.answer_scores, new], axis=1), K)
    both = jnp.concatenate([state.answers, grown], axis=1)
    return jnp.take_along_axis(both, kept[:, :, None], axis=1), scores


def _may_improve(best, answer_scores, length, most, beam):
    """Whether a beginning with the score `best` [B] may still become one of the K best answers."""
    is_full = jnp.all(answer_scores > LOW, axis=1)
    if beam.early_stopping is True:
        return ~is_full
    longest = most if beam.early_stopping == "never" and beam.length_penalty > 0 else length
    reachable = best / jnp.asarray(longest, jnp.float32) ** beam.length_penalty
    return ~is_full | (reachable > jnp.min(answer_scores, axis=1))


def texts_of(tokens: jax.Array, stop_ids: tuple[int, ...]) -> list[np.ndarray]:
    """Each row of tokens [..., T] up to its first stop token, that included."""
    rows = np.asarray(tokens).reshape(-1, np.shape(tokens)[-1])
    ends = [np.flatnonzero(np.isin(row, stop_ids)) for row in rows]
    return [row[: at[0] + 1] if len(at) else row for row, at in zip(rows, ends)]


def answers(answerer: Answerer, prompts: Iterable[Prompt], beam: Beam, max_new_tokens: int) -> Iterator[str]:
    """The best answer to each prompt, one after another.

    Raises:
      UserError: marks and images disagree, or a prompt with its answer exceeds the LLM's positions.
    """
    for prompt in prompts:
        (sample,) = prompt_samples(answerer, [prompt])
        length, tiles = len(sample.tokens), len(sample.tiles)
        check_lengths(answerer.hovle.config.llm, length, max_new_tokens, tiles)
        batch = prompt_batch(answerer, [sample], -(-length // PADDED) * PADDED, padded_tiles(max(tiles, 1)))
        tokens, _ = search(
            answerer.params, batch, hovle=answerer.hovle, beam=beam, max_new_tokens=max_new_tokens,
            stop_ids=answerer.tokenizer.stop_ids,
        )  # fmt: skip
        yield text_of(answerer.tokenizer, np.asarray(tokens[0, 0]))
