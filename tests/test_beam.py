"""Beam search against public code's answers and against looking at every answer."""

import json

import jax
import numpy as np
import pytest

from hovle_jax.components import COMPONENTS
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.inference.beam import PADDED, Beam, answers, search, texts_of
from hovle_jax.inference.generate import prompt_batch, prompt_samples, text_of
from hovle_jax.model.config import HoVLEConfig
from hovle_jax.model.hovle import HoVLE
from tests.public_models import llm
from tests.shared import golden
from tests.test_decode import make_answerer, prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batch_of(ids):
    """Prompts of one length [B, L]."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return dict(tokens=ids.astype(np.int32), positions=positions, segment_ids=np.ones(ids.shape, np.int32))


def found_by(hovle, params, ids, beam, most, stop_ids):
    tokens, scores = search(params, batch_of(ids), hovle=hovle, beam=beam, max_new_tokens=most, stop_ids=stop_ids)
    return texts_of(tokens, stop_ids), np.asarray(scores).ravel()


def test_answers_and_scores_are_public_codes():
    folder = golden("sampling")
    checkpoint = open_checkpoint(golden("llama-hf-tiny"))
    hovle, params = HoVLE(HoVLEConfig(None, checkpoint.config)), {"llm": checkpoint.load()}
    expected = np.load(folder / "beam.npz")
    ids = expected["input_ids"]
    for number, s in enumerate(json.loads((folder / "beam_settings.json").read_text())):
        beam = Beam(s["num_beams"], s["length_penalty"], s["early_stopping"])
        stop_ids = () if s["eos_token_id"] is None else (s["eos_token_id"],)
        texts, scores = found_by(hovle, params, ids, beam, s["max_new_tokens"], stop_ids)
        wanted = texts_of(expected[f"beam{number}.sequences"][:, ids.shape[1] :], stop_ids)
        assert [text.tolist() for text in texts] == [text.tolist() for text in wanted], s
        np.testing.assert_allclose(scores, expected[f"beam{number}.scores"], atol=1e-5, err_msg=str(s))


def random_llm():
    config = llm("llama")
    module = COMPONENTS["llm"].module(ModelConfig(llm=config), HoVLE(HoVLEConfig(None, config)).execution)
    init = jax.jit(lambda *inputs: module.init(jax.random.key(3), *inputs)["params"])
    params = init(*COMPONENTS["llm"].inputs(ModelConfig(llm=config)))
    params = jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), params, is_leaf=lambda x: hasattr(x, "names"))
    params["head"]["kernel"] *= 4  # a distribution that is not flat
    return HoVLE(HoVLEConfig(None, config)), {"llm": params}


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_answers():
    hovle, params = random_llm()
    V, stop = hovle.config.llm.vocab_size, 5
    ids = np.asarray([[3, 1, 4]])
    run = jax.jit(hovle.logits)
    logp = lambda rows: np.asarray(jax.nn.log_softmax(run(params, batch_of(rows))))
    first = logp(ids)[0, -1]
    second = logp(np.concatenate([np.repeat(ids, V, 0), np.arange(V)[:, None]], 1))[:, -1]
    totals = {(a, b): (first[a] + second[a, b]) / 2 for a in range(V) for b in range(V) if a != stop}
    totals[(stop,)] = first[stop]
    best = sorted(totals, key=totals.get)[::-1][:3]
    texts, scores = found_by(hovle, params, ids, Beam(V, 1.0, "never"), 2, (stop,))
    assert [tuple(text.tolist()) for text in texts[:3]] == best
    np.testing.assert_allclose(scores[:3], [totals[text] for text in best], atol=1e-5)


def test_one_beam_is_greedy_and_prompts_do_not_touch_each_other():
    hovle, params = random_llm()
    ids = np.asarray([[3, 1, 4], [1, 5, 9]])
    texts, _ = found_by(hovle, params, ids, Beam(1), 5, ())
    rows, run = ids, jax.jit(hovle.logits)
    for _ in range(5):
        padded = np.pad(rows, ((0, 0), (0, 8 - rows.shape[1])))  # what comes later changes nothing
        best = np.asarray(run(params, batch_of(padded)))[:, rows.shape[1] - 1].argmax(-1)
        rows = np.concatenate([rows, best[:, None]], 1)
    np.testing.assert_array_equal(texts, rows[:, 3:])
    together, scores = found_by(hovle, params, ids, Beam(3, 0.7), 6, (7, 11))
    for row in range(2):
        alone, alone_scores = found_by(hovle, params, ids[row : row + 1], Beam(3, 0.7), 6, (7, 11))
        assert [text.tolist() for text in alone] == [text.tolist() for text in together[3 * row : 3 * row + 3]]
        np.testing.assert_allclose(alone_scores, scores[3 * row : 3 * row + 3], atol=1e-5)


def test_an_answer_about_images_is_that_of_the_search_without_padding():
    answerer, (prompt,) = make_answerer("post"), prompts()[2:]
    (text,) = answers(answerer, [prompt], Beam(2), 4)
    batch = prompt_batch(answerer, prompt_samples(answerer, [prompt]))
    assert batch["tokens"].shape[1] % PADDED
    stop_ids = answerer.tokenizer.stop_ids
    tokens, _ = search(answerer.params, batch, hovle=answerer.hovle, beam=Beam(2), max_new_tokens=4, stop_ids=stop_ids)
    assert text == text_of(answerer.tokenizer, np.asarray(tokens[0, 0]))
    with pytest.raises(UserError, match="the model reads 512 in all"):
        next(answers(answerer, [prompt], Beam(2), 500))


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="beams=0: at least 1"):
        Beam(0)
    with pytest.raises(UserError, match="early_stopping='soon': one of True, False, 'never'"):
        Beam(2, early_stopping="soon")
