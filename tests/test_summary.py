"""What a finished run shows of its answers: intervals, baselines, samples, held-out rows."""

import dataclasses
import json

import numpy as np
import pytest

from hovle_jax.config import ExecutionConfig
from hovle_jax.evaluation import summary
from hovle_jax.evaluation.benchmark import Answered, Benchmark, Item
from hovle_jax.evaluation.easy_vqa import QUESTIONS, ZERO_SHOT
from hovle_jax.evaluation.intervals import MeanScore
from hovle_jax.evaluation.results import Scored
from hovle_jax.evaluation.scorers import anls, exact
from hovle_jax.evaluation.wilson import wilson_interval
from hovle_jax.report.metrics import read_metrics
from hovle_jax.report.page import Sample
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


def mean(answers, references, scorer=exact):
    references = [(reference,) for reference in references]
    scores = [scorer(*pair) for pair in zip(answers, references)]
    return MeanScore.of(scores, references, [()] * len(references), scorer)


def test_a_mean_score_knows_its_error_and_what_blind_guessing_gives():
    score = mean(["no", "no", "yes", "no"], ["no", "yes", "Yes.", "yes"])
    assert score == MeanScore(2, 4, "yes", 3)
    assert score.percent == 50 and score.standard_error == 25 and score.baseline == 75
    assert score.text() == ("50.00%", '95% CI 15.0 to 85.0%; 2 of 4; always "yes" would give 75.0%')
    partly = mean(["ab", "xyzw"], ["ax", "xyzz"], anls)
    assert partly == MeanScore(1.25, 2, "xyzz", 1) and "1.2 of 2" in partly.text()[1]
    with pytest.raises(ValueError):
        MeanScore.of([1.0], [("no",), ("yes",)], [()], exact)


def answered(got, expected, image=IMAGE, question="?", group=""):
    item = Item.of(image, question, expected, group=group) if image is not None else None
    return Answered(item or Item((), ((question, None),), (expected,)), got, exact(got, (expected,)))


def test_each_kind_of_question_has_its_own_baseline():
    rows = [("yes", "no", "yes/no"), ("red", "red", "colour"), ("no", "no", "yes/no")]
    parts = QUESTIONS.means([answered(got, expected, group=group) for got, expected, group in rows])
    assert list(parts) == ["accuracy", "accuracy yes/no", "accuracy colour"]  # nobody asked for a shape
    assert parts["accuracy"].total == 2 and parts["accuracy yes/no"] == MeanScore(1, 2, "no", 2)
    captions = [answered("a red circle", "a red triangle"), answered("a blue circle", "a blue circle")]
    parts = ZERO_SHOT.means(captions)
    assert [parts[name].total for name in ("accuracy", "accuracy colour", "accuracy shape")] == [1, 2, 1]
    assert ZERO_SHOT.scores(captions)["images"] == 2


def test_samples_are_mistakes_first_and_fill_up_with_either():
    record = lambda right, i: Sample(IMAGE, f"{i}?", "yes" if right else "no", "yes")
    marks = lambda records: [sample.right for sample in summary.choose_samples(records)]
    many = [record(i % 2 == 0, i) for i in range(200)]
    assert marks(many) == [False] * 8 + [True] * 16
    prompts = [sample.prompt for sample in summary.choose_samples(many)]
    assert prompts[0] == "1?" and prompts[7] == "199?" and prompts[8] == "0?" and prompts[-1] == "198?"  # all over
    assert marks([record(False, i) for i in range(50)]) == [False] * 24
    assert marks([record(True, i) for i in range(3)] + [record(False, 9)]) == [False] + [True] * 3
    assert marks([]) == []


HELD_OUT = Scored(
    Benchmark(items=tuple, metric="accuracy on held-out rows"),
    [
        answered("Red.", "red", question="what color is it?"),
        answered("no", "yes", None, "is it?"),
        answered("no", "no"),
    ],
)


def test_held_out_rows_are_scored_as_the_samples_are_marked():
    expected = {"accuracy on held-out rows": 66.667, "standard error": 27.217, "questions": 3}
    assert summary.scores_of(HELD_OUT) == expected and summary.scores_of(None) == {}
    assert HELD_OUT.mistakes == 1 == sum(sample.right is False for sample in summary.choose_samples(HELD_OUT.samples))


@pytest.mark.usefixtures("quick_compilation", "micro_corpus")
@pytest.mark.slow
def test_the_report_of_a_run_on_own_data(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "score_run", lambda config, folder, benchmark: HELD_OUT)
    config = micro.run_config("contrast", steps=2, log_every=1, execution=ExecutionConfig(dtype="auto"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="rows.jsonl"))
    folder = tmp_path / "runs" / "contrast"
    result = loop.run(config, folder, {}, say=lambda line: None)
    result = dataclasses.replace(result, held_out={0: {"loss": 2.0}, 2: {"loss": 1.0}})
    results = summary.summarize(config, result, None)
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
