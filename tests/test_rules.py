"""The rule sets: cases worked out by hand from the published rules, and the results of the original scorers."""

import json

import pytest

from hovle_jax.errors import UserError
from hovle_jax.evaluation import rules
from hovle_jax.evaluation.rules import Case, mmmu, yes_no
from hovle_jax.evaluation.rules.table import RULES
from hovle_jax.evaluation.wilson import wilson_interval
from tests.rule_cases import ANIMALS, BY_HAND, FORMULA, asked
from tests.shared import golden

VLMEVALKIT, LMMS_EVAL, INTERNVL = rules.RULE_SETS
SCORED = [key for key, rule in RULES.items() if not isinstance(rule, str)]
HAND_CASES = [
    pytest.param(benchmark, rule_set, *case[:2], score, id=f"{benchmark}-{rule_set}-{case[0]}")
    for benchmark, cases in BY_HAND.items()
    for case in cases
    for rule_set, score in zip(rules.RULE_SETS, case[2], strict=True)
    if score is not None
]


@pytest.mark.parametrize("benchmark, rule_set, prediction, row, score", HAND_CASES)
def test_a_case_scores_as_the_rules_say(benchmark, rule_set, prediction, row, score):
    case = Case.of({**row, "prediction": prediction})
    assert rules.find(benchmark, rule_set).score(case).score == pytest.approx(score)


def test_every_rule_has_cases_by_hand():
    """InfoVQA's is DocVQA's."""
    covered = {(case.values[0], case.values[1]) for case in HAND_CASES}
    assert covered == {key for key in SCORED if key[0] != "InfoVQA"}
    assert all(RULES["InfoVQA", rule_set] is RULES["DocVQA", rule_set] for rule_set in rules.RULE_SETS)


def report(benchmark, rule_set, rows=None):
    """(the main number, the report) of these rows, or of the benchmark's by hand."""
    rows = rows or [{**row, "prediction": prediction} for prediction, row, _ in BY_HAND[benchmark]]
    score = rules.scored(benchmark, "test", rule_set, map(Case.of, rows))
    assert (score.benchmark, score.split, score.rule_set, len(score.verdicts)) == (
        benchmark,
        "test",
        rule_set,
        len(rows),
    )
    return score.value, score.report


@pytest.mark.parametrize("benchmark, rule_set, value, expected", [
    ("ChartQA", VLMEVALKIT, 60, {"overall": 60, "human_test": 50, "augmented_test": 200 / 3}),
    ("ChartQA", LMMS_EVAL, 0.4, {"overall": 0.4, "human_test": 0.5, "augmented_test": 1 / 3}),
    ("ChartQA", INTERNVL, 7 / 12, {"human_test": 0.5, "augmented_test": 2 / 3, "mean_of_splits": 7 / 12}),
    ("GQA", VLMEVALKIT, 50, {"overall": 50}),
    ("GQA", LMMS_EVAL, 0.75, {"overall": 0.75}),
    ("GQA", INTERNVL, 0.25, {"accuracy": 0.25}),
    ("MMMU", VLMEVALKIT, 0.5, {"overall": 0.5, "Art": 0, "Math": 1}),
    ("MMMU", LMMS_EVAL, 0.5, {"accuracy_without_random_hits": 0.5, "Art": 1, "Math": 0}),
    ("SEED", INTERNVL, 25, {"accuracy_percent": {"Total": 25, "Image": 0, "Video": 50},
                            "type_percent": {"t1": 0, "t10": 50}}),
    ("OCRBench", LMMS_EVAL, 3, {"total": 3}),
    ("OCRBench", VLMEVALKIT, 2, {"Text Recognition": 1, "Scene Text-centric VQA": 0, "Doc-oriented VQA": 0,
                                 "Key Information Extraction": 0, FORMULA: 1,
                                 "Final Score": 2, "Final Score Norm": 0.2}),
    ("POPE", VLMEVALKIT, 100, {"rating": {
        "Overall": {"Overall": 100, "acc": 80, "precision": 100, "recall": 100},
        "random": {"Overall": 100, "acc": 100, "precision": 100, "recall": 100},
        "popular": {"Overall": 0, "acc": 200 / 3, "precision": 0, "recall": 0},
    }}),
    ("POPE", LMMS_EVAL, 0, {"accuracy": 0.2, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0.2}),
    ("POPE", INTERNVL, 50, {"f1": {"random": 1, "popular": 0}, "overall_f1": 50}),
    ("MME", VLMEVALKIT, 50, {"perception": 50, "reasoning": 0, "count": 0, "OCR": 50}),
    ("MME", LMMS_EVAL, 50, {"mme_perception_score": 50, "mme_cognition_score": 0,
                            "categories": {"count": 50, "OCR": 0}}),
    ("MME", INTERNVL, 100, {"perception": 100, "cognition": 0, "categories": {"count": 50, "OCR": 50}}),
])  # fmt: skip
def test_what_is_reported(benchmark, rule_set, value, expected):
    found, everything = report(benchmark, rule_set)
    assert found == pytest.approx(value)
    assert_same(everything, expected)


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        assert found == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-9))


def test_a_right_pair_of_mme_has_200_points_and_reasoning_counts():
    pair = [
        {"category": "code_reasoning", "image": "1", "answer": answer, "prediction": answer} for answer in ("Yes", "No")
    ]
    assert [report("MME", rule_set, pair)[0] for rule_set in rules.RULE_SETS] == [200, 200, 200]
    with pytest.raises(UserError, match=r"code_reasoning: the image '1' has 1 question\(s\), not 2; .* whole images"):
        report("MME", VLMEVALKIT, pair[:1])


def all_right(benchmark):
    texts = ("TextVQA", "DocVQA", "InfoVQA", "ChartQA", "GQA", "MMMU open")
    answer = "blue" if benchmark in texts else "yes" if benchmark in ("POPE", "HallusionBench") else "A"
    row = asked(
        answer, "cat", "dog", index="0_1_2_3_4_5", category="c", split="s", question_type_id=1, prediction=answer
    )
    row |= {"answers": [answer] * (10 if benchmark == "TextVQA" else 1), "l2-category": "d"}
    if benchmark == "MME":
        categories = [*yes_no.PERCEPTION, *yes_no.COGNITION]
        return [
            {**row, "category": name, "image": "1", "answers": ["no"], "prediction": "no"} for name in categories
        ] * 2
    kept = {"index": 1} if benchmark == "MMBench" else {"category": FORMULA} if benchmark == "OCRBench" else {}
    return [row | kept] * (1000 if benchmark == "OCRBench" else 1)


@pytest.mark.parametrize("benchmark, rule_set", [key for key in SCORED if key != ("MMBench", INTERNVL)])
def test_where_every_answer_is_right_the_number_is_full(benchmark, rule_set):
    assert report(benchmark, rule_set, all_right(benchmark))[0] == pytest.approx(RULES[benchmark, rule_set].full)


def test_pope_counts_a_row_of_two_categories_twice_and_recall_of_unknown_answers():
    rows = [{"answer": "yes", "category": "random,popular", "prediction": "yes"},
            {"answer": "yes", "category": "popular", "prediction": "maybe"}]  # fmt: skip
    _, found = report("POPE", VLMEVALKIT, rows)
    assert found["rating"]["Overall"] == pytest.approx(dict(Overall=80, acc=200 / 3, precision=100, recall=200 / 3))
    assert report("POPE", LMMS_EVAL, rows)[1]["recall"] == 1  # 'maybe' is not 'no'


def test_hallusion_bench_counts_whole_figures_and_questions():
    right = {(0, 0): 1, (0, 1): 1, (1, 0): 1, (1, 1): 0}  # (figure, question)
    rows = [{"index": f"h_VS_chart_7_{figure}_{question}", "category": "VS", "l2-category": "chart", "answer": "No",
             "prediction": ("yes", "no")[hit]} for (figure, question), hit in right.items()]  # fmt: skip
    value, found = report("HallusionBench", VLMEVALKIT, rows)
    assert found["rating"] == dict.fromkeys(("Overall", "VS", "chart"), {"aAcc": 75, "fAcc": 50, "qAcc": 50})
    assert value == pytest.approx(175 / 3)
    with pytest.raises(UserError, match="index 'seven' is not of the form prefix_category"):
        report("HallusionBench", VLMEVALKIT, [{**rows[0], "index": "seven"}])


def rotated(first, *predictions, **more):
    options = ANIMALS[:2]
    for i, prediction in enumerate(predictions):
        turned = options[i:] + options[:i]
        yield asked("AB"[turned.index("cat")], *turned, index=first + 1_000_000 * i, prediction=prediction, **more)


def test_a_question_of_mmbench_counts_where_all_rotations_are_right():
    cross = "finegrained_perception (cross-instance)"
    rows = [
        *rotated(1, "A", "B", category="c1", split="dev"),
        *rotated(2, "A", "A", **{"l2-category": cross}, split="dev"),
        *rotated(1_000_003, "A", split="dev"),  # without its first row
    ]
    value, found = report("MMBench", VLMEVALKIT, rows)
    assert (value, found["group_hit"]) == (0.5, {"1": 1, "2": 0})
    assert found["accuracy"] == {"split": "dev", "Overall": 0.5, "FP-C": 0, "c1": 1}
    value, found = report("MMBench", LMMS_EVAL, rows)
    assert (value, found["category"], found["l2_category"]) == (0.5, {"c1": 1}, {cross: 0})
    rows[0]["split"] = "test"
    value, found = report("MMBench", VLMEVALKIT, rows)
    assert (value, found["accuracy"]["split"], found["accuracy"]["Overall"]) == (0.5, ["test", "dev"], [1, 0])
    with pytest.raises(UserError, match="index 'x' is no number"):
        report("MMBench", VLMEVALKIT, [{**rows[0], "index": "x"}])


def test_the_interval_of_a_mean_is_wilsons():
    rows = [{"index": i, "answer": "left", "prediction": "left" if i % 4 else "right"} for i in range(40)]
    for rule_set, scale in ((VLMEVALKIT, 100), (LMMS_EVAL, 1)):
        score = rules.scored("GQA", "val", rule_set, map(Case.of, rows))
        # The jackknife's variance is that of a sample, so it has one question less.
        assert score.interval == pytest.approx([scale * end for end in wilson_interval(0.75 * 39, 39)])
    right = rules.scored("GQA", "val", VLMEVALKIT, map(Case.of, rows[1:4]))
    assert right.interval == pytest.approx([100 * end for end in wilson_interval(3, 3)])
    assert right.interval[1] == right.value == 100
    alone = rules.scored("GQA", "val", VLMEVALKIT, map(Case.of, rows[:1]))
    assert alone.interval == pytest.approx([100 * end for end in wilson_interval(0, 1)])
    rows = [{"index": i, "answer": "a", "prediction": "ab"[i % 2], "category": FORMULA} for i in range(40)]
    counted = rules.scored("OCRBench", "test", VLMEVALKIT, map(Case.of, rows))
    assert counted.value == 20 and counted.interval == pytest.approx([40 * end for end in wilson_interval(19.5, 39)])


def test_what_stands_or_falls_together_makes_an_interval_wider():
    """Rotations of one question, the pair of an image, a row in three categories."""
    repeated = [row for i in range(30) for row in rotated(i, *("AB" if i % 3 else "AA"))]
    assert rules.scored("MMBench", "dev", VLMEVALKIT, map(Case.of, repeated)).interval == pytest.approx(
        wilson_interval(20 * 29 / 30, 29)
    )
    pairs = [{"answer": "yes", "category": "count", "image": str(i), "prediction": "yes" if i % 2 else "no"}
             for i in range(30) for _ in range(2)]  # fmt: skip
    low, high = rules.scored("MME", "test", VLMEVALKIT, map(Case.of, pairs)).interval
    assert low < 100 < high and high - low > 50  # 200 points of pairs, 30 of them
    once = [{"index": i, "answer": "yes", "prediction": "yes" if i % 2 else "no", "category": "a"} for i in range(60)]
    thrice = [row | {"category": name} for row in once for name in "abc"]
    first, again = (rules.scored("POPE", "test", INTERNVL, map(Case.of, cases)).interval for cases in (once, thrice))
    assert first == pytest.approx(again) and 0 < first[0] < 200 / 3 < first[1] < 100


def test_a_case_of_a_row_has_texts():
    case = Case.of({"answer": 3, "options": [1, 3], "l2-category": None, "category": "count", "prediction": "3"})
    assert (case.answers, case.options, case.l2_category, case.category) == (("3",), ("1", "3"), "", "count")


def test_candidates_of_an_open_answer():
    answers = {
        "First 5.\nSo the result is = 1,234.567": (234.57, 1234.0, 1234.57),  # also 1,234 and 234.567
        "x = 3e2 m": (2.0, 300.0, "3e2 m"),
        "It is :": ("it is :",),
        "It is Z": (" z", "z "),
        "": ("",),
    }
    assert {answer: mmmu.candidates(answer) for answer in answers} == answers


@pytest.mark.parametrize("benchmark, rule_set, rows, match", [
    ("MM-Vet", VLMEVALKIT, [], "MM-Vet by the rules of vlmevalkit needs a judge model: write the submission file"),
    ("MathVista", INTERNVL, [], "needs a judge model"),
    ("HallusionBench", LMMS_EVAL, [], "needs a judge model.* or use vlmevalkit"),
    ("OCRBench", INTERNVL, [], "not in InternVL's repository: use vlmevalkit or lmms-eval"),
    ("MMBench", INTERNVL, [], "leave MMBench to its server: write the submission file and have that scored there"),
    ("MMBench", "openai", [], "unknown rule set 'openai'; use one of vlmevalkit, lmms-eval, internvl"),
    ("CIFAR", LMMS_EVAL, [], "no rule set scores 'CIFAR'; they score TextVQA, DocVQA"),
    ("AI2D", VLMEVALKIT, [], "no answers to score"),
    ("AI2D", VLMEVALKIT, [{"index": 7, "answer": "A", "prediction": "A"}], "the row 7 has no options"),
    ("MME", VLMEVALKIT, [{"index": 0, "answers": [], "prediction": ""}], "row 0 has no answers and no category and no"),
    ("GQA", VLMEVALKIT, [{"index": 3, "answer": None, "prediction": None}], "row 3 has no answers"),
    ("SEED", INTERNVL, [asked("A", "x", "y", prediction="A")], "no question_type_id, which accuracy needs"),
])  # fmt: skip
def test_what_cannot_be_scored_is_said(benchmark, rule_set, rows, match):
    with pytest.raises(UserError, match=match):
        rules.scored(benchmark, "val", rule_set, map(Case.of, rows))


# ---------------------------------------------------------------------------------------------------------------------
# The original scorers

SAME = ("InfoVQA", "MMMU")  # rules whose parts are in the files
LISTED = [key for key in SCORED if key[0] not in SAME]
# What stands for `Verdict.extracted` and `.score` in the files.
EXTRACTED = "extracted normalised_prediction parsed prefetched value converted filtered prediction candidates".split()
SCORES = ("score", "hit", "correct")


def listed(rule_set):
    return {part["benchmark"]: part for part in json.loads((golden("scorers") / f"{rule_set}.json").read_text())}


@pytest.mark.parametrize("rule_set", rules.RULE_SETS)
def test_every_benchmark_of_the_original_scorers_is_compared(rule_set):
    assert set(listed(rule_set)) == {benchmark for benchmark, rules_of in LISTED if rules_of == rule_set}


@pytest.mark.parametrize("benchmark, rule_set", LISTED)
def test_cases_and_reports_are_those_of_the_original(benchmark, rule_set):
    part, rule = listed(rule_set)[benchmark], rules.find(benchmark, rule_set)
    cases = [Case.of(row) for row in part["cases"]]
    verdicts = [rule.score(case) for case in cases]
    for row, verdict in zip(part["cases"], verdicts, strict=True):
        assert_verdict(row, verdict)
    if "aggregate" in part:
        assert_same(rule.aggregate(list(zip(cases, verdicts, strict=True))), part["aggregate"])


def assert_verdict(row, verdict):
    expected = row["expected"] | row["expected"].get("post_process", {})
    if "raises" in expected:
        assert verdict.score == 0, row
        return
    extracted, scores = ([expected[name] for name in names if name in expected] for names in (EXTRACTED, SCORES))
    assert extracted or scores, row
    assert [verdict.extracted] * len(extracted) == [
        tuple(one) if isinstance(one, list) else one for one in extracted
    ], row
    for score in scores:
        assert verdict.score == pytest.approx(float(score or 0), abs=1e-9), row


def test_the_official_parser_of_mmmu_is_that_of_the_original():
    for row in listed(INTERNVL)["MMMU multiple-choice"]["cases"]:
        assert mmmu.letter_official(row["prediction"], row["options"]) == row["expected"]["official_parse"], row
