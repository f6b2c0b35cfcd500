"""HoVLE as a classifier: how likely is each class's name as the answer to a question about the image?

The score of a class is the mean log-likelihood of its answer's tokens, the end of the answer included, so that a long
name is not unlikely for its length: as multiple choice is scored for language models (Brown et al. 2020, section 2.4,
"normalise by length").

Letters: N images, C classes, R rows of a batch, L tokens, A answer tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

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
from hovle_jax.model.hovle import HoVLE
from hovle_jax.system.batching import batched

DEFAULT_PROMPT = "what is in the picture?"
ANSWER_STEP = 8  # tokens by which rows of answers grow


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
        samples = [sample for image in images for sample in self._samples(image)]
        scores = np.zeros(len(samples), np.float32)
        self._shapes.add_rows(len(samples), self.batch_size)
        for keys, length, tiles in self._shapes.group(dict(enumerate(samples))):
            for part in batched(keys, self._shapes.rows):
                scores[part] = self._scored([samples[key] for key in part], length, tiles)
        return scores.reshape(len(images), len(self.names))

    def _samples(self, image) -> Iterator[Sample]:
        """A row for each class. Raises UserError for one that is longer than the model reads."""
        processor = self.loaded.answerer.processor
        (tiles,) = processor.cut([image])
        for name in self.names:
            encoded = processor.encode(((self.prompt, name),), (len(tiles),))
            check_lengths(self.loaded.answerer.hovle.config.llm, len(encoded.tokens), 0, len(tiles))
            if not encoded.supervised.any():
                raise UserError(f"the class {name!r} has no token that the model could answer with")
            yield Sample(encoded.tokens, encoded.supervised, tiles)

    def _scored(self, samples, length, tiles):
        answerer, rows = self.loaded.answerer, self._shapes.rows
        filled = samples + [samples[-1]] * (rows - len(samples))
        answers = max(np.count_nonzero(sample.supervised) for sample in filled)
        places = np.zeros((rows, -(-answers // ANSWER_STEP) * ANSWER_STEP), np.int32)
        weights = np.zeros(places.shape, np.float32)
        for row, sample in enumerate(filled):
            at = np.flatnonzero(sample.supervised)
            places[row, : len(at)], weights[row, : len(at)] = at, 1 / len(at)
        batch = prompt_batch(answerer, filled, length, tiles)
        made = _log_likelihood(answerer.params, batch, places, weights, hovle=answerer.hovle)
        return np.asarray(made)[: len(samples)]

    def flops(self) -> float:
        """Of a row as long as the questions so far, for each class."""
        config = self.loaded.answerer.hovle.config
        assert config.embedding is not None, "an LLM alone"
        length, tiles = max(self._shapes.made.values(), default=(STEP, 1))
        each = config.embedding.stack_tokens_per_tile - config.embedding.tokens_per_tile
        work = flops.embedding_ends(config.embedding, tiles)
        work += flops.decoder_stack(config.embedding.stack, length + tiles * each)
        work += flops.decoder_stack(config.llm.stack, length) + flops.llm_head(config.llm, ANSWER_STEP)
        return work.forward * len(self.names)


@functools.partial(jax.jit, static_argnames="hovle")
def _log_likelihood(params, batch: dict, places: jax.Array, weights: jax.Array, *, hovle: HoVLE) -> jax.Array:
    """[R]: the weighted sum of the log-likelihoods of the tokens at `places` [R, A], each given those before it.

    Logits are made of these places alone: of all of them they would take L / A times the memory.
    """
    hidden, _ = hovle.hidden(params, batch)
    before = jnp.take_along_axis(hidden, jnp.maximum(places - 1, 0)[:, :, None], axis=1)
    targets = jnp.take_along_axis(batch["tokens"], places, axis=1)
    scores = jax.nn.log_softmax(hovle.hidden_to_logits(params, before))
    return jnp.sum(jnp.take_along_axis(scores, targets[:, :, None], axis=2)[:, :, 0] * weights, axis=1)
