"""Each scorer against small cases of its paper, and against the public rule sets where those are at hand."""

import json

import pytest

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.evaluation import scorers
from hovle_jax.evaluation.rules.short_answers import edit_distance
from hovle_jax.evaluation.scorers import anls, choice, exact, inferred_option, relaxed, vqa, whole_option
from hovle_jax.evaluation.vqa_text import normalised
from tests.shared import golden

ANIMALS = ["cat", "dog", "bird", "fish"]


@pytest.mark.parametrize("answer, references, score", [
    ("Red.", ["red"], 1), (" a  red circle ", ["a red circle"], 1), ("red", ["blue", "Red"], 1), ("red!", ["red"], 0),
    ("", ["red"], 0), ("dark red", ["red"], 0),
])  # fmt: skip
def test_exact(answer, references, score):
    assert exact(answer, references, ()) == score


@pytest.mark.parametrize("answer, references, score", [
    ("105", ["100"], 1), ("95", ["100"], 1), ("94.9", ["100"], 0), ("-105", ["-100"], 1), ("100", ["-100"], 0),
    ("50%", ["0.51"], 1), ("50", ["50%"], 0), ("0", ["0"], 1), ("0.0", ["0"], 0), ("Blue", ["blue"], 1),
    ("blue", ["7"], 0), ("1,000", ["1000"], 0), ("7", ["9", "7.1"], 1), ("", ["0"], 0),
])  # fmt: skip
def test_relaxed(answer, references, score):
    assert relaxed(answer, references, ()) == score


def test_edit_distance():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("ab", "ab"))] == [
        3, 3, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("answer, references, score", [
    ("Hello  World", ["hello world"], 1), ("helo world", ["goodbye", "hello world"], 10 / 11), ("ab", ["ax"], 0.5),
    ("abc", ["axx"], 0), ("", ["hello"], 0), ("The answer is 42", ["42"], 0),
])  # fmt: skip
def test_anls(answer, references, score):
    assert anls(answer, references, ()) == pytest.approx(score)


@pytest.mark.parametrize("answer, references, score", [
    ("red", ["red"] * 10, 1), ("red", ["red"] * 3 + ["blue"] * 7, 0.9), ("red", ["red"] + ["blue"] * 9, 0.3),
    ("Red.", ["red"] * 4 + ["blue"] * 6, 1), ("two", ["2"] * 10, 1), ("the dog", ["a dog"] * 10, 1),
    ("dont", ["don't"] * 10, 1), ("red", ["red"], 1), ("red", ["blue"], 0), ("red", ["red", "red"], 1),
    ("red", ["red", "blue"], 0.5), ("red", ["red", "red", "blue"], 2 / 3),
])  # fmt: skip
def test_vqa(answer, references, score):
    assert vqa(answer, references, ()) == pytest.approx(score)


def test_answers_of_vqa_are_written_alike():
    texts = {"The Coca-Cola.": "coca cola", "3.14": "3.14", "1,000": "1000", "yes/no": "yes no", "U.S.A.": "usa",
             "7 - up, please": "7 up please", "none": "0", "wouldnt've": "wouldn't've", "a": "",
             "im": "im", "lets": "lets"}  # fmt: skip
    assert {text: normalised(text) for text in texts} == texts


@pytest.mark.parametrize("answer, reference, score", [
    ("B", "B", 1), ("(b)", "dog", 1), ("Dog", "B", 1), ("B. dog", "dog", 1), ("The answer is B", "B", 1),
    ("It is a dog", "B", 1), ("A or B", "A", 0), ("E", "A", 0), ("cat", "dog", 0), ("", "cat", 0),
])  # fmt: skip
def test_choice(answer, reference, score):
    assert choice(answer, [reference], ANIMALS) == score


def test_an_answer_that_is_an_option_as_a_whole_names_it():
    assert choice("green house", ["B"], ["house", "Green house", "green"]) == 1
    assert inferred_option("green house", ["house", "Green house", "green"]) is None
    assert choice("10", ["10"], ["1", "10", "100"]) == 1
    assert choice("A", ["A"], ["B", "A"]) == choice("A", ["B"], ["B", "A"]) + 1  # a letter before a text


def test_rows_that_cannot_be_chosen_from_are_refused():
    with pytest.raises(BadSample, match="no_options"):
        choice("", ["A"], [])
    with pytest.raises(BadSample, match="not_an_option: .*'cat', 'dog'"):
        choice("", ["horse"], ["cat", "dog"])


def test_an_unknown_scorer_is_named():
    with pytest.raises(UserError, match="'bleu'; use one of exact, relaxed, anls, choice, vqa"):
        scorers.find("bleu")


# ---------------------------------------------------------------------------------------------------------------------
# The public rule sets


def cases(rules, benchmark):
    """[(what stands in the file, prediction, references, options)]."""
    for listed in json.loads((golden("scorers") / f"{rules}.json").read_text()):
        if listed["benchmark"] == benchmark:
            for case in listed["cases"]:
                references = case["answers"] if "answers" in case else [case["answer"]]
                yield case, case["prediction"], references, case.get("options", ())


@pytest.mark.parametrize("rules, benchmark, scorer, differing", [
    ("vlmevalkit", "ChartQA", relaxed, set()),
    ("lmms-eval", "ChartQA", relaxed, {" Blue "}),  # blanks around an answer count there
    ("vlmevalkit", "DocVQA", anls, set()),
    ("lmms-eval", "DocVQA", anls, set()),
    ("vlmevalkit", "TextVQA", vqa, {"No. 5."}),  # a full stop at the end stays there
    ("lmms-eval", "TextVQA", vqa, set()),
])  # fmt: skip
def test_scores_are_those_of_the_rule_set(rules, benchmark, scorer, differing):
    found = {
        prediction
        for case, prediction, references, options in cases(rules, benchmark)
        if scorer(prediction, references, options) != pytest.approx(case["expected"]["score"], abs=1e-9)
    }
    assert found == differing


def test_normalised_answers_are_those_of_the_rule_set():
    for case, prediction, *_ in cases("lmms-eval", "TextVQA"):
        assert normalised(prediction) == case["expected"]["normalised_prediction"]


@pytest.mark.parametrize("benchmark", ["MMBench", "MMMU multiple-choice", "SEED", "ScienceQA", "AI2D"])
def test_options_are_inferred_as_by_the_rule_set(benchmark):
    """And `choice` goes beyond it in answers that as a whole are an option."""
    for case, prediction, references, options in cases("vlmevalkit", benchmark):
        index = inferred_option(prediction, options)
        assert (None if index is None else "ABCD"[index]) == case["expected"]["extracted"], prediction
        if whole_option(prediction, options) is None:
            assert choice(prediction, references, options) == (case["expected"]["extracted"] == case["answer"])
