"""A benchmark's cases -> its score."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.evaluation.rules.case import Case, Verdict
from hovle_jax.evaluation.rules.certainty import interval
from hovle_jax.evaluation.rules.table import SUBMISSION, find


@dataclasses.dataclass(frozen=True)
class Score:
    """A benchmark's score, with what it is a score of.

    Attributes:
      benchmark, split, rule_set: without all three a number says little.
      metric: what `value` is called.
      value: the main number, as the rule set scales it.
      full: what `value` is where every answer is right: 1 = a fraction, 100 = percent, 1000 and 2800 = points.
      interval: the 95% confidence interval of `value` (`certainty.interval`).
      report: all that the rule set reports, in its names.
      verdicts: of each case, in the order of the cases.
    """

    benchmark: str
    split: str
    rule_set: str
    metric: str
    value: float
    full: float
    interval: tuple[float, float]
    report: dict[str, Any]
    verdicts: tuple[Verdict, ...]


def scored(benchmark: str, split: str, rule_set: str, cases: Iterable[Case]) -> Score:
    """Scores a benchmark by a rule set.

    Args:
      benchmark, rule_set: of `table.RULES`.
      split: the name of the data's split, which is only kept.

    Raises UserError for a benchmark that the rule set cannot score, no cases, or a case that lacks a field.
    """
    rule, cases = find(benchmark, rule_set), list(cases)
    if rule.aggregate is None:
        raise UserError(f"the rules of {rule_set} leave {benchmark} to its server: {SUBMISSION} there")
    if not cases:
        raise UserError(f"{benchmark} {split}: no answers to score; give at least one")
    for case in cases:
        rule.check(case)
    verdicts = tuple(map(rule.score, cases))
    pairs = tuple(zip(cases, verdicts, strict=True))
    report, ends = rule.aggregate(pairs), interval(rule, pairs)
    return Score(benchmark, split, rule_set, rule.metric, rule.main(report), rule.full, ends, report, verdicts)
