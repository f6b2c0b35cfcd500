"""What a finished run shows of its answers: intervals, baselines, samples, held-out rows."""

import dataclasses
import json

import numpy as np
import pytest

from hovle_jax.config import ExecutionConfig
from hovle_jax.evaluation import summary
from hovle_jax.evaluation.intervals import ExactMatch, wilson_interval
from hovle_jax.report.metrics import read_metrics
from hovle_jax.training import loop
from tests import micro
from tests.test_tracking import events

IMAGE = micro.draw("red", "circle")


def test_intervals_of_wilson():
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998: 81 of 263, 15 of 148, 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_exact_match_knows_its_error_and_what_blind_guessing_gives():
    exact = ExactMatch.of(["no", "no", "yes", "no"], ["no", "yes", "yes", "yes"])
    assert exact == ExactMatch(2, 4, "yes", 3)
    assert exact.percent == 50 and exact.standard_error == 25 and exact.baseline == 75
    assert exact.text() == ("50.00%", '95% CI 15.0 to 85.0%; 2 of 4; always "yes" would give 75.0%')
    with pytest.raises(ValueError):
        ExactMatch.of(["no"], ["no", "yes"])


def test_each_kind_of_question_has_its_own_baseline():
    records = [(IMAGE, "?", got, expected) for got, expected in (("yes", "no"), ("red", "red"), ("no", "no"))]
    parts = summary.exact_parts(records, summary.QUESTION_PARTS)
    assert parts.keys() == {"accuracy", "accuracy yes/no", "accuracy colour"}  # nobody asked for a shape
    assert parts["accuracy"].right == 2 and parts["accuracy yes/no"] == ExactMatch(1, 2, "no", 2)
    captions = [(IMAGE, "", "a red circle", "a red triangle"), (IMAGE, "", "a blue circle", "a blue circle")]
    parts = summary.exact_parts(captions, summary.CAPTION_PARTS)
    assert [parts[name].right for name in ("accuracy", "accuracy colour", "accuracy shape")] == [1, 2, 1]


def test_samples_are_mistakes_first_and_fill_up_with_either():
    record = lambda right, i: (IMAGE, f"{i}?", "yes" if right else "no", "yes")
    marks = lambda records: [sample.right for sample in summary.choose_samples(records)]
    many = [record(i % 2 == 0, i) for i in range(200)]
    assert marks(many) == [False] * 8 + [True] * 16
    prompts = [sample.prompt for sample in summary.choose_samples(many)]
    assert prompts[0] == "1?" and prompts[7] == "199?" and prompts[8] == "0?" and prompts[-1] == "198?"  # all over
    assert marks([record(False, i) for i in range(50)]) == [False] * 24
    assert marks([record(True, i) for i in range(3)] + [record(False, 9)]) == [False] + [True] * 3
    assert marks([]) == []


HELD_OUT = [(IMAGE, "what color is it?", "Red.", "red"), (None, "is it?", "no", "yes"), (IMAGE, "is it?", "no", "no")]


def test_held_out_rows_are_scored_as_the_samples_are_marked():
    scored = summary.score_held_out(HELD_OUT)
    assert scored.scores == {"accuracy on held-out rows": 66.667, "standard error": 27.217, "questions": 3}
    assert scored.mistakes() == 1 == sum(sample.right is False for sample in summary.choose_samples(scored.records))


@pytest.mark.usefixtures("quick_compilation", "micro_corpus")
def test_the_report_of_a_run_on_own_data(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "held_out_records", lambda config, folder: HELD_OUT)
    config = micro.run_config("contrast", steps=2, log_every=1, execution=ExecutionConfig(dtype="auto"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="rows.jsonl"))
    folder = tmp_path / "runs" / "contrast"
    result = loop.run(config, folder, {}, say=lambda line: None)
    result = dataclasses.replace(result, held_out={0: {"loss": 2.0}, 2: {"loss": 1.0}})
    results = summary.summarize(config, result)
    assert results == json.loads((folder / "results.json").read_text())
    assert results["accuracy on held-out rows"] == 66.667 and results["held-out loss at step 2"] == 1.0
    text = (folder / "report.html").read_text()
    for part in (
        "66.67%", "95% CI", "always &quot;yes&quot; would give 33.3%", "2.000 at step 0",
        "Samples: 1 mistake, and 2 right ones", "parameters", "peak memory, host", "of 24 samples", "All stages",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("data:image/png") == 4  # two samples, curves, the first batch
    last = read_metrics(folder)[-1]
    assert last["score/accuracy on held-out rows"] == 66.667 and np.isfinite(last["loss"])
    assert (2, "answers", "image") in events(folder)
    assert "66.67% accuracy on held-out rows" in (tmp_path / "runs" / "report.html").read_text()
