"""Decoding with the caches gives what a full forward gives, in every variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.config import ModelConfig
from hovle_jax.data.batch import Sample
from hovle_jax.data.processor import Processor
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Answerer, Prompt, answer, greedy, prompt_batch, prompt_samples, text_of
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.streams import embedding_stream
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "pre": dict(variant="pre"),
    "none": dict(variant="none"),
    "special table, HD": dict(variant="post", special=9),
    "normalized output": dict(variant="pre", normalize_output=True),
}
NEW = 6


def make_answerer(variant="pre", special=0, normalize_output=False):
    config = micro.run_config("instruct", variant, special=special)
    embedding = dataclasses.replace(config.model.embedding, normalize_output=normalize_output)
    model = dataclasses.replace(config.model, embedding=embedding)
    params = micro.params(config)
    # Random weights may say <IMG_CONTEXT>, which would stand for an image that is not there.
    head = params["llm"]["head"]
    head["kernel"] = head["kernel"].at[:, micro.tokenizer().image_id].set(0)
    return Answerer(
        HoVLE(model), params, Processor.of(ModelConfig(model.embedding, system_message="s"), micro.tokenizer())
    )


def prompts():
    """Of different lengths: one image, none, two."""
    images = [example.image for example in micro.examples()[3:6]]
    return [
        Prompt.of("what color is the shape?", images[0]),
        Prompt.of("hello"),
        Prompt.of("<image> or <image>?", *images[1:]),
    ]


def longer(sample, tokens):
    """The sample followed by generated tokens."""
    both = np.concatenate([sample.tokens, np.asarray(tokens, np.int32)])
    return Sample(both, np.zeros(len(both), bool), sample.tiles)


def run_greedy(answerer, batch, stop_ids=(-1,)):
    tokens = greedy(answerer.params, batch, hovle=answerer.hovle, max_new_tokens=NEW, stop_ids=stop_ids)
    return np.asarray(tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_text_after_copies_of_the_caches_is_the_full_forward(name):
    """Two texts of different lengths after each prompt."""
    answerer = make_answerer(**VARIANTS[name])
    hovle, params = answerer.hovle, answerer.params
    samples, ends = prompt_samples(answerer, prompts()), ([5, 9, 7], [11, 6])
    batch, room = prompt_batch(answerer, samples), 4
    long = embedding_stream(batch).tokens.shape[1]
    cache = hovle.empty_cache(3, batch["tokens"].shape[1] + room, long + room)
    _, cache = jax.jit(hovle.prefill)(params, batch, cache)
    tokens = jnp.asarray([end + [0] * (room - len(end)) for end in ends], jnp.int32)
    there = jnp.asarray([[1] * len(end) + [0] * (room - len(end)) for end in ends], jnp.int32)
    repeat = lambda rows: jnp.tile(rows, (3, 1))
    hidden, after = jax.jit(hovle.append)(params, repeat(tokens), repeat(there), cache.repeated(2))
    whole = prompt_batch(answerer, [longer(sample, end) for sample in samples for end in ends])
    full = np.asarray(jax.jit(lambda params, batch: hovle.hidden(params, batch)[0])(params, whole))
    for row, (sample, end) in enumerate((sample, end) for sample in samples for end in ends):
        n = len(sample.tokens)
        np.testing.assert_allclose(hidden[row, : len(end)], full[row, n : n + len(end)], rtol=2e-4, atol=2e-4)
        assert after.llm.length[row] == n + len(end)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_the_full_forward(name):
    answerer = make_answerer(**VARIANTS[name])
    hovle, params = answerer.hovle, answerer.params
    samples = prompt_samples(answerer, prompts())
    lengths = [len(s.tokens) for s in samples]
    assert len(set(lengths)) == 3 and [len(s.tiles) for s in samples] == [1, 0, 2]
    batch = prompt_batch(answerer, samples)
    tokens = run_greedy(answerer, batch)

    # The full forward over prompt and answer. Causality makes one pass do for all steps: a token is judged by the
    # logits of the place before it, which see nothing after it.
    whole = prompt_batch(answerer, [longer(s, row) for s, row in zip(samples, tokens)])
    logits = np.asarray(jax.jit(hovle.logits)(params, whole))
    full = np.stack([row[n - 1 : n - 1 + NEW] for row, n in zip(logits, lengths)])  # [B, NEW, V]
    np.testing.assert_array_equal(tokens, full.argmax(-1))

    # The same logits, step by step, out of the caches.
    L_embedding = embedding_stream(batch).tokens.shape[1]
    assert (L_embedding > batch["tokens"].shape[1]) == (hovle.config.embedding.pixel_shuffle == "post")
    cache = hovle.empty_cache(3, batch["tokens"].shape[1] + NEW, L_embedding + NEW)
    got, cache = jax.jit(hovle.prefill)(params, batch, cache)
    np.testing.assert_array_equal(cache.llm.length, lengths)
    np.testing.assert_allclose(got, full[:, 0], atol=1e-4)
    decode = jax.jit(hovle.decode)
    for step in range(NEW - 1):
        got, cache = decode(params, tokens[:, step], jnp.ones(3, bool), cache)
        np.testing.assert_allclose(got, full[:, step + 1], atol=1e-4, err_msg=f"step {step}")
    np.testing.assert_array_equal(cache.llm.length, np.asarray(lengths) + NEW - 1)
    np.testing.assert_array_equal(cache.embedding.length - cache.llm.length, (L_embedding > batch["tokens"].shape[1])
                                  * np.asarray([12, 0, 24]))  # fmt: skip

    # A row that is not active is computed and forgotten.
    active = jnp.asarray([False, True, True])
    _, skipped = decode(params, tokens[:, 0], active, cache)
    grown = skipped.llm.length - cache.llm.length, skipped.embedding.length - cache.embedding.length
    np.testing.assert_array_equal(grown, [[0, 1, 1]] * 2)


def test_the_answer_depends_on_the_image():
    answerer = make_answerer()
    logits = jax.jit(answerer.hovle.logits)
    first, second = (
        logits(answerer.params, prompt_batch(answerer, prompt_samples(answerer, [Prompt.of("what is it?", p.image)])))
        for p in micro.examples()[:2]
    )
    assert np.abs(first[0, -1] - second[0, -1]).max() > 1e-3


def test_rows_that_stop_early_stay_stopped_and_leave_the_others_alone():
    answerer = make_answerer("post")
    batch = prompt_batch(answerer, prompt_samples(answerer, prompts()))
    free = run_greedy(answerer, batch)
    stop = int(free[0, 2])

    def cut(row):
        at = np.flatnonzero(row == stop)
        return row if not len(at) else np.where(np.arange(NEW) > at[0], stop, row)

    expected = np.stack([cut(row) for row in free])
    assert (expected[0, 2:] == stop).all() and (expected != free).any() and (expected[1:] != stop).any()
    np.testing.assert_array_equal(run_greedy(answerer, batch, (stop, 0)), expected)
    # All rows stop with their first token: the loop ends at once.
    firsts = tuple(int(token) for token in free[:, 0])
    np.testing.assert_array_equal(run_greedy(answerer, batch, firsts), np.repeat(free[:, :1], NEW, axis=1))


def test_answers_do_not_depend_on_the_company():
    answerer = make_answerer()
    together = answer(answerer, prompts(), NEW, batch_size=2)  # two batches, the second filled up
    alone = [answer(answerer, [prompt], NEW)[0] for prompt in prompts()]
    assert together == alone and len(set(alone)) > 1


def test_text_of_an_answer_ends_at_its_stop_token():
    tokenizer = micro.tokenizer()
    red, end = tokenizer.encode(" red "), tokenizer.special("<|im_end|>")
    assert text_of(tokenizer, np.asarray([*red, end, *red, end])) == "red"
    assert text_of(tokenizer, np.asarray([*red, tokenizer.eos, end])) == "red"
    assert text_of(tokenizer, np.asarray(red)) == "red" and text_of(tokenizer, np.asarray([end])) == ""


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused():
    answerer = make_answerer()
    with pytest.raises(
        UserError, match=r"its answer may have 600: the model reads 512 in all; ask for at most \d+ new"
    ):
        answer(answerer, [Prompt.of("hello")], max_new_tokens=600)
    image = micro.examples()[0].image
    with pytest.raises(UserError, match=r"tokens, those of 200 tiles included, .* give fewer images or tiles"):
        answer(answerer, [Prompt.of("what?", *[image] * 200)])


def test_a_conversation_goes_on_after_its_earlier_answers():
    answerer = make_answerer()
    first, second = ("what is it?", "a circle"), ("and its color?", None)
    (sample,) = prompt_samples(answerer, [Prompt((first, second), (micro.examples()[0].image,), "be kind")])
    text = micro.tokenizer().decode(sample.tokens, skip_special=False)
    assert "be kind" in text and "assistant\na circle<|im_end|>" in text and text.endswith("assistant\n")


def test_tiles_differ_in_number_from_prompt_to_prompt():
    """A wide image has three tiles; alone and in a batch with others it gives the same answer."""
    answerer = make_answerer()
    wide = np.concatenate([example.image for example in micro.examples()[:2]], axis=1)
    asked = [Prompt.of("what is it?", wide), Prompt.of("what is it?", wide[:, :32]), Prompt.of("hello")]
    assert [len(s.tiles) for s in prompt_samples(answerer, asked)] == [3, 1, 0]
    together = answer(answerer, asked, NEW, batch_size=2)
    assert together == [answer(answerer, [one], NEW)[0] for one in asked]
