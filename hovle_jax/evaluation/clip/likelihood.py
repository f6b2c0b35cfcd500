"""HoVLE as a classifier: how likely is each class's name as the answer to a question about the image?

The score of a class is the mean log-likelihood of its answer's tokens, the end of the answer included, so that a long
name is not unlikely for its length: as multiple choice is scored for language models (Brown et al. 2020, section 2.4,
"normalise by length").

An image and the question are read once. What follows for each class, its ending, is read after copies of their caches.

Letters: N images, C classes, K classes at once, L tokens of a question, T tokens of an ending, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.data.batch import Sample
from hovle_jax.errors import UserError
from hovle_jax.evaluation.asking import STEP, Shapes
from hovle_jax.inference.generate import prompt_batch
from hovle_jax.inference.limits import check_lengths
from hovle_jax.inference.load import Loaded
from hovle_jax.model import flops
from hovle_jax.model.hovle import HoVLE, HoVLECache
from hovle_jax.model.streams import embedding_stream
from hovle_jax.system.batching import batched

DEFAULT_PROMPT = "what is in the picture?"
ENDING_STEP = 8  # tokens by which rows of endings grow


class Endings(NamedTuple):
    """What follows the question for each class.

    Attributes:
      question: [L] int32: the tokens before them, of an image of one tile.
      tokens: [C, T] int32, padded with 0.
      there: [C, T] int32: 1 for tokens, 0 for padding.
      weights: [C, T] float32: 1 / (tokens of the answer) for these, 0 elsewhere.
    """

    question: np.ndarray
    tokens: np.ndarray
    there: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class LikelihoodClassifier:
    """An embedding and an LLM that choose among names.

    Attributes:
      prompt: the question.
      batch_size: rows of a batch; each image takes one for each class.
    """

    loaded: Loaded
    names: tuple[str, ...]
    prompt: str = DEFAULT_PROMPT
    batch_size: int = 64
    _shapes: Shapes = dataclasses.field(default_factory=Shapes)

    @property
    def kind(self) -> str:
        """See `classifiers.KINDS`."""
        return "likelihood"

    @property
    def at_once(self) -> int:
        """Images whose rows fill a batch."""
        return max(1, self.batch_size // len(self.names))

    def reduced(self, image: Any) -> Any:
        """As it is: its tiles depend on its size, and few images are in a batch."""
        return image

    def probabilities(self, images: Sequence) -> np.ndarray:
        """[N, C] float32, a softmax of `scores`."""
        scores = self.scores(images).astype(np.float64)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def scores(self, images: Sequence) -> np.ndarray:
        """[N, C] float32: the mean log-likelihood of the tokens of each class's answer."""
        samples = list(map(self._question, images))
        scores = np.zeros((len(samples), len(self.names)), np.float32)
        self._shapes.add_rows(len(samples), self.at_once)
        for keys, length, tiles in self._shapes.group(dict(enumerate(samples))):
            for part in batched(keys, self._shapes.rows):
                scores[part] = self._scored([samples[key] for key in part], length, tiles)
        return scores

    @functools.cached_property
    def endings(self) -> Endings:
        """Of all classes. Raises UserError where the model could not answer with one of them."""
        processor = self.loaded.answerer.processor
        encoded = [processor.encode(((self.prompt, name),), (1,)) for name in self.names]
        for name, each in zip(self.names, encoded):
            if not each.supervised.any():
                raise UserError(f"the class {name!r} has no token that the model could answer with")
        # A tokenizer may join what comes before an answer with its beginning.
        before = min(int(np.argmax(each.supervised)) for each in encoded)
        same = np.all([each.tokens[:before] == encoded[0].tokens[:before] for each in encoded], axis=0)
        begin = before if same.all() else int(np.argmin(same))
        longest = max(len(each.tokens) for each in encoded) - begin
        shape = len(encoded), -(-longest // ENDING_STEP) * ENDING_STEP
        tokens, there, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, each in enumerate(encoded):
            count = len(each.tokens) - begin
            tokens[row, :count], there[row, :count] = each.tokens[begin:], 1
            weights[row, :count] = each.supervised[begin:] / np.count_nonzero(each.supervised)
        return Endings(encoded[0].tokens[:begin], tokens, there, weights)

    def _question(self, image) -> Sample:
        """An image with what stands before the endings. Raises UserError where it is longer than the model reads."""
        processor, hovle = self.loaded.answerer.processor, self.loaded.answerer.hovle
        (tiles,) = processor.cut([image])
        is_image = self.endings.question == processor.tokenizer.image_id
        first, last = np.flatnonzero(is_image)[[0, -1]]
        visual = np.full(len(tiles) * processor.tokens_per_tile, processor.tokenizer.image_id, np.int32)
        tokens = np.concatenate([self.endings.question[:first], visual, self.endings.question[last + 1 :]])
        check_lengths(hovle.config.llm, len(tokens), self.endings.tokens.shape[1], len(tiles))
        return Sample(tokens, np.zeros(len(tokens), bool), tiles)

    def _scored(self, samples, length, tiles):
        """[n, C] of at most as many images as a batch has, whose classes follow a few at a time."""
        answerer, rows = self.loaded.answerer, self._shapes.rows
        filled = samples + [samples[-1]] * (rows - len(samples))
        of_class, at_once = self.endings[1:], max(1, min(len(self.names), self.batch_size // rows))
        batch = prompt_batch(answerer, filled, length, tiles)
        read = _read(answerer.params, batch, hovle=answerer.hovle, room=of_class[0].shape[1])
        scores = []
        for part in batched(range(len(self.names)), at_once):
            chosen = [part[min(i, len(part) - 1)] for i in range(at_once)]
            made = _log_likelihood(answerer.params, *read, *(each[chosen] for each in of_class), hovle=answerer.hovle)
            scores.append(np.asarray(made)[: len(samples), : len(part)])
        return np.concatenate(scores, axis=1)

    def flops(self) -> float:
        """Of a question as long as those so far, and of each class's ending after it."""
        config = self.loaded.answerer.hovle.config
        assert config.embedding is not None, "an LLM alone"
        length, tiles = max(self._shapes.made.values(), default=(STEP, 1))
        each = config.embedding.stack_tokens_per_tile - config.embedding.tokens_per_tile
        more = self.endings.tokens.shape[1]

        def layers(count):
            stacks = (config.embedding.stack, count + tiles * each), (config.llm.stack, count)
            return sum(flops.decoder_stack(*stack).forward for stack in stacks)

        ending = layers(length + more) - layers(length) + flops.llm_head(config.llm, more).forward
        question = flops.embedding_ends(config.embedding, tiles).forward + layers(length)
        return question + flops.llm_head(config.llm, 1).forward + ending * len(self.names)


@functools.partial(jax.jit, static_argnames=("hovle", "room"))
def _read(params, batch: dict, *, hovle: HoVLE, room: int) -> tuple[jax.Array, HoVLECache]:
    """Questions -> (log-probabilities [N, V] of the token after each, caches with room for so many tokens more)."""
    rows, length = batch["tokens"].shape
    long = embedding_stream(batch).tokens.shape[1]
    logits, cache = hovle.prefill(
        params, batch, hovle.empty_cache(rows, length + room, long + room, hovle.execution.dtype)
    )
    return jax.nn.log_softmax(logits), cache


@functools.partial(jax.jit, static_argnames="hovle")
def _log_likelihood(
    params,
    first: jax.Array,
    cache: HoVLECache,
    tokens: jax.Array,
    there: jax.Array,
    weights: jax.Array,
    *,
    hovle: HoVLE,
) -> jax.Array:
    """[N, K]: the weighted sum of the log-likelihoods of each ending's tokens, each given those before it.

    Args:
      first: [N, V]: log-probabilities of an ending's first token.
      cache: of N questions.
      tokens, there, weights: [K, T], see `Endings`.
    """
    N, (K, T) = len(first), tokens.shape
    every = lambda rows: jnp.tile(rows, (N, 1))  # [N * K, T], as the copies lie
    hidden, _ = hovle.append(params, every(tokens), every(there), cache.repeated(K))
    made = jax.nn.log_softmax(hovle.hidden_to_logits(params, hidden[:, :-1])).reshape(N, K, T - 1, -1)
    later = jnp.take_along_axis(made, tokens[None, :, 1:, None], axis=3)[..., 0]
    scores = jnp.concatenate([jnp.take(first, tokens[:, 0], axis=1)[..., None], later], axis=2)
    return jnp.sum(scores * weights, axis=2)
