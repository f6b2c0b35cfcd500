"""The table of rule sets: (benchmark, rule set) -> how it is scored there.

A score is of a benchmark, a split and a rule set. The rule sets are those of public repositories, each without a judge:
  vlmevalkit  VLMEvalKit with exact matching;
  lmms-eval   lmms-eval 0.7; MMBench in its static evaluation;
  internvl    InternVL's internvl_chat/eval.
"""

from collections.abc import Callable
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.evaluation.rules import mmbench, mmmu, options, reports, short_answers, yes_no
from hovle_jax.evaluation.rules.case import Rule
from hovle_jax.evaluation.rules.reports import overall

VLMEVALKIT, LMMS_EVAL, INTERNVL = RULE_SETS = ("vlmevalkit", "lmms-eval", "internvl")
SUBMISSION = "write the submission file and have that scored"


def _at(*path: str) -> Callable[[dict[str, Any]], float]:
    """The number that lies at this path in a report."""

    def main(report: dict[str, Any]) -> float:
        found: Any = report
        for name in path:
            found = found[name]
        return found

    return main


def _sum_of(*names: str) -> Callable[[dict[str, Any]], float]:
    return lambda report: sum(report[name] for name in names)


def _hallusion(report: dict[str, Any]) -> float:
    return reports.mean(report["rating"]["Overall"].values())


def _circular(report: dict[str, Any]) -> float:
    return reports.mean(report["group_hit"].values())  # of all splits


def _mean(score, *levels, metric="accuracy", name="overall", needs=()):
    return Rule(score=score, aggregate=overall(*levels, name=name), main=_at(name), metric=metric, needs=needs)


def _percent(score, metric, needs=()):
    """VLMEvalKit's short answers."""
    aggregate = reports.splits_or_categories
    return Rule(score=score, aggregate=aggregate, main=_at("overall"), metric=metric, full=100, needs=needs)


def _choice(score):
    """VLMEvalKit's multiple choice."""
    return _mean(score, "l2_category", "category", needs=("options",))


_INFERRED = options.read_by(options.inferred)
_LEADING = options.read_by(options.leading)
_MMMU_LMMS_EVAL = options.read_by(mmmu.letter_lmms_eval)
_MMMU_INTERNVL = options.read_by(options.leading_of_stripped)
_PARTS = ("category",)
_CIRCULAR = ("options", "index")
_PAIRS = ("category", "image")
_JUDGE = f"needs a judge model: {SUBMISSION} by one"
_SEED_TYPES = ("question_type_id",)
_WITHOUT_RANDOM = "accuracy_without_random_hits"

RULES: dict[tuple[str, str], Rule | str] = {
    ("TextVQA", VLMEVALKIT): _percent(short_answers.vqa_vlmevalkit, "soft accuracy"),
    ("TextVQA", LMMS_EVAL): _mean(short_answers.vqa_eval_ai, metric="soft accuracy"),
    ("TextVQA", INTERNVL): _mean(short_answers.vqa_eval_ai, metric="soft accuracy"),
    ("DocVQA", VLMEVALKIT): _percent(short_answers.anls_vlmevalkit, "ANLS"),
    ("DocVQA", LMMS_EVAL): _mean(short_answers.anls_of_raw_lengths, metric="ANLS"),
    ("DocVQA", INTERNVL): _mean(short_answers.anls_of_raw_lengths, metric="ANLS"),
    ("ChartQA", VLMEVALKIT): _percent(short_answers.relaxed_vlmevalkit, "relaxed accuracy"),
    ("ChartQA", LMMS_EVAL): _mean(short_answers.relaxed_lmms_eval, "split", metric="relaxed accuracy"),
    ("ChartQA", INTERNVL): Rule(
        score=short_answers.relaxed_internvl,
        aggregate=reports.mean_of_splits,
        main=_at("mean_of_splits"),
        metric="mean of the splits' relaxed accuracies",
        needs=("split",),
    ),
    ("GQA", VLMEVALKIT): _percent(short_answers.equal_vlmevalkit, "accuracy"),
    ("GQA", LMMS_EVAL): _mean(short_answers.equal_lmms_eval),
    ("GQA", INTERNVL): _mean(short_answers.equal_internvl, name="accuracy"),
    ("OCRBench", VLMEVALKIT): Rule(
        score=short_answers.contained_vlmevalkit,
        aggregate=reports.ocrbench_vlmevalkit,
        main=_at("Final Score"),
        metric="right answers of 1000",
        full=1000,
        needs=_PARTS,
        sums=True,
    ),
    ("OCRBench", LMMS_EVAL): Rule(
        score=short_answers.contained_lmms_eval,
        aggregate=reports.ocrbench_lmms_eval,
        main=_at("total"),
        metric="right answers of 1000",
        full=1000,
        needs=_PARTS,
        sums=True,
    ),
    ("OCRBench", INTERNVL): f"is not in InternVL's repository: use {VLMEVALKIT} or {LMMS_EVAL}",
    ("POPE", VLMEVALKIT): Rule(
        score=yes_no.read_by(yes_no.word),
        aggregate=yes_no.pope_vlmevalkit,
        main=_at("rating", "Overall", "Overall"),
        metric="F1 of all",
        full=100,
    ),
    ("POPE", LMMS_EVAL): Rule(
        score=yes_no.read_by(yes_no.whole), aggregate=yes_no.pope_lmms_eval, main=_at("f1"), metric="F1 of all"
    ),
    ("POPE", INTERNVL): Rule(
        score=yes_no.read_by(yes_no.first_sentence),
        aggregate=yes_no.pope_internvl,
        main=_at("overall_f1"),
        metric="mean of the categories' F1",
        full=100,
        needs=_PARTS,
    ),
    ("MME", VLMEVALKIT): Rule(
        score=yes_no.read_by(yes_no.word),
        aggregate=yes_no.mme_vlmevalkit,
        main=_sum_of("perception", "reasoning"),
        metric="points of 2800",
        full=2800,
        needs=_PAIRS,
        unit=yes_no.image_of,
    ),
    ("MME", LMMS_EVAL): Rule(
        score=yes_no.read_by(yes_no.beginning_lmms_eval),
        aggregate=yes_no.mme_lmms_eval,
        main=_sum_of("mme_perception_score", "mme_cognition_score"),
        metric="points of 2800",
        full=2800,
        needs=_PAIRS,
        unit=yes_no.image_of,
    ),
    ("MME", INTERNVL): Rule(
        score=yes_no.read_by(yes_no.beginning_internvl),
        aggregate=yes_no.mme_internvl,
        main=_sum_of("perception", "cognition"),
        metric="points of 2800",
        full=2800,
        needs=_PAIRS,
        unit=yes_no.image_of,
    ),
    ("HallusionBench", VLMEVALKIT): Rule(
        score=yes_no.read_by(yes_no.word),
        aggregate=yes_no.hallusion_vlmevalkit,
        main=_hallusion,
        metric="mean of aAcc, fAcc and qAcc",
        full=100,
        needs=("index", "category", "l2_category"),
        unit=yes_no.set_of,
    ),
    ("HallusionBench", LMMS_EVAL): f"{_JUDGE}, or use {VLMEVALKIT}",
    ("HallusionBench", INTERNVL): f"is not in InternVL's repository: use {VLMEVALKIT}",
    ("MMBench", VLMEVALKIT): Rule(
        score=_INFERRED,
        aggregate=mmbench.circular_vlmevalkit,
        main=_circular,
        metric="circular accuracy",
        needs=_CIRCULAR,
        unit=mmbench.question_of,
    ),
    ("MMBench", LMMS_EVAL): Rule(
        score=mmbench.score_lmms_eval,
        aggregate=mmbench.circular_lmms_eval,
        main=_at("overall"),
        metric="circular accuracy",
        needs=_CIRCULAR,
        unit=mmbench.question_of,
    ),
    ("MMBench", INTERNVL): Rule(
        score=_LEADING,
        aggregate=None,
        main=_at(),
        metric="a submission",
        needs=_CIRCULAR,
        unit=mmbench.question_of,
    ),
    ("MMMU multiple-choice", VLMEVALKIT): _choice(_INFERRED),
    ("MMMU multiple-choice", LMMS_EVAL): _mean(_MMMU_LMMS_EVAL, name=_WITHOUT_RANDOM, needs=("options",)),
    ("MMMU multiple-choice", INTERNVL): _mean(_MMMU_INTERNVL, name="accuracy", needs=("options",)),
    ("MMMU open", VLMEVALKIT): _mean(mmmu.open_vlmevalkit, "l2_category", "category"),
    ("MMMU open", LMMS_EVAL): _mean(mmmu.open_answer, name="accuracy"),
    ("MMMU open", INTERNVL): _mean(mmmu.open_answer, name="accuracy"),
    ("MMMU", VLMEVALKIT): _mean(mmmu.either(_INFERRED, mmmu.open_vlmevalkit), "l2_category", "category"),
    ("MMMU", LMMS_EVAL): _mean(mmmu.either(_MMMU_LMMS_EVAL, mmmu.open_answer), "category", name=_WITHOUT_RANDOM),
    ("MMMU", INTERNVL): _mean(mmmu.either(_MMMU_INTERNVL, mmmu.open_answer), "category", name="accuracy"),
    ("SEED", VLMEVALKIT): _choice(_INFERRED),
    ("SEED", LMMS_EVAL): _mean(options.read_by(options.first_of_stripped, same_case=False)),
    ("SEED", INTERNVL): Rule(
        score=options.read_by(options.first_character),
        aggregate=reports.seed_internvl,
        main=_at("accuracy_percent", "Total"),
        metric="accuracy",
        full=100,
        needs=_SEED_TYPES,
    ),
    ("ScienceQA", VLMEVALKIT): _choice(_INFERRED),
    ("ScienceQA", LMMS_EVAL): _mean(options.letter_scienceqa),
    ("ScienceQA", INTERNVL): _mean(options.read_by(options.leading_scienceqa), name="accuracy", needs=("options",)),
    ("AI2D", VLMEVALKIT): _choice(_INFERRED),
    ("AI2D", LMMS_EVAL): _mean(options.letter_ai2d),
    ("AI2D", INTERNVL): _mean(short_answers.exact_internvl),
} | {(benchmark, rules): _JUDGE for benchmark in ("MM-Vet", "MathVista") for rules in RULE_SETS}
RULES |= {("InfoVQA", rules): RULES["DocVQA", rules] for rules in RULE_SETS}
BENCHMARKS = tuple(dict.fromkeys(benchmark for benchmark, _ in RULES))


def find(benchmark: str, rule_set: str) -> Rule:
    """The rule of a benchmark in a rule set. Raises UserError where there is none, with what to do instead."""
    if rule_set not in RULE_SETS:
        raise UserError(f"unknown rule set {rule_set!r}; use one of {', '.join(RULE_SETS)}")
    if benchmark not in BENCHMARKS:
        raise UserError(f"no rule set scores {benchmark!r}; they score {', '.join(BENCHMARKS)}")
    rule = RULES[benchmark, rule_set]
    if isinstance(rule, str):
        raise UserError(f"{benchmark} by the rules of {rule_set} {rule}")
    return rule
