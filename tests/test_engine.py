"""The engine's answers are those of the plain full forward: chunked, side by side, one after another, from a prefix."""

import dataclasses

import jax
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Engine, Request
from hovle_jax.inference.generate import Prompt, prompt_batch, prompt_samples
from hovle_jax.inference.sampling import Sampling
from tests import micro
from tests.test_decode import VARIANTS, longer, make_answerer, prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = 6
SETTINGS = dict(slots=2, length=160, tiles=4, chunks=(8, 32))


def check_greedy(answerer, streams, asked):
    """Each token is the most likely one after the prompt and the tokens before it, by a forward of the whole."""
    samples = [longer(s, stream.tokens) for s, stream in zip(prompt_samples(answerer, asked), streams)]
    logits = np.asarray(jax.jit(answerer.hovle.logits)(answerer.params, prompt_batch(answerer, samples)))
    for row, sample, stream in zip(logits, samples, streams):
        n = len(sample.tokens) - len(stream.tokens)
        before = row[n - 1 : len(sample.tokens) - 1]
        assert stream.tokens == before.argmax(-1).tolist()
        np.testing.assert_allclose(
            stream.logprobs, np.asarray(jax.nn.log_softmax(before))[range(len(before)), stream.tokens], atol=1e-4
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_the_full_forward(name):
    answerer = make_answerer(**VARIANTS[name])
    engine = Engine(answerer, **SETTINGS)
    asked = [*prompts(), Prompt.of("and now?"), *prompts()[:1]]  # more than there are slots
    streams = [engine.submit(prompt, Request(max_new_tokens=NEW + i)) for i, prompt in enumerate(asked)]
    engine.run()
    assert all(stream.finish in ("length", "stop") for stream in streams)
    assert len({tuple(stream.tokens[:NEW]) for stream in streams}) > 1
    check_greedy(answerer, streams, asked)
