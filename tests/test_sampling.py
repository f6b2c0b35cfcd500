"""Filters and draws against public code's results, and against their definitions."""

import json

import jax
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.inference import sampling
from hovle_jax.inference.sampling import Sampling, SamplingRows
from tests.shared import golden


def probabilities(logits, seen, setting):
    rows = SamplingRows.of([setting] * len(logits))
    left = sampling.filtered(sampling.penalized(logits, seen, rows.repetition_penalty), rows)
    return np.asarray(jax.nn.softmax(left, axis=-1)), np.asarray(left > sampling.GONE)


def test_filters_leave_what_public_code_leaves():
    folder = golden("sampling")
    expected = np.load(folder / "expected.npz")
    logits, seen = expected["logits"], np.zeros(expected["logits"].shape, bool)
    np.put_along_axis(seen, expected["previous_ids"], True, axis=1)
    for number, fields in enumerate(json.loads((folder / "settings.json").read_text())):
        found, kept = probabilities(logits, seen, Sampling(**fields))
        wanted, wanted_kept = expected[f"case{number}.probs"], expected[f"case{number}.kept"]
        np.testing.assert_array_equal(kept.sum(axis=1), wanted_kept.sum(axis=1), err_msg=str(fields))
        # Row 0 has ties, whose order is the sort's own business.
        np.testing.assert_array_equal(kept[1:], wanted_kept[1:], err_msg=str(fields))
        np.testing.assert_allclose(found[1:], wanted[1:], atol=1e-6, err_msg=str(fields))
        np.testing.assert_allclose(np.sort(found[0]), np.sort(wanted[0]), atol=1e-6, err_msg=str(fields))


def draws(logits, settings, index=0):
    rows = SamplingRows.of(settings)
    return np.asarray(sampling.draw(logits, rows, np.full(len(settings), index, np.int32)))


def some_logits(rows, vocab=50):
    return np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 2


def test_a_draw_depends_on_its_row_alone():
    logits = some_logits(6)
    settings = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in range(5)] + [sampling.GREEDY]
    together = draws(logits, settings)
    alone = [draws(logits[i : i + 1], [setting])[0] for i, setting in enumerate(settings)]
    assert together.tolist() == alone
    assert together[-1] == logits[-1].argmax()


def test_draws_follow_the_probabilities():
    logits = np.tile(some_logits(1, vocab=8), (4000, 1))
    setting = [Sampling(temperature=1.5, min_p=0.05, seed=seed) for seed in range(len(logits))]
    drawn = np.bincount(draws(logits, setting), minlength=8) / len(logits)
    wanted, _ = probabilities(logits[:1], np.zeros((1, 8), bool), setting[0])
    assert np.abs(drawn - wanted[0]).max() < 0.03
    assert len({int(draws(logits[:1], setting[:1], index=i)[0]) for i in range(20)}) > 1  # a key for each token


@pytest.mark.parametrize("field, value", [("temperature", -1), ("top_p", 0), ("min_p", 2), ("repetition_penalty", 0)])
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Sampling(**{field: value})
