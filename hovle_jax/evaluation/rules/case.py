"""One answered question, what a rule set makes of it, and what a rule is."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model's answer to one question, beside what the question's row says; a rule names the fields that it needs.

    Attributes:
      prediction: the answer as the model gave it.
      answers: the references: texts, or the one letter of a multiple choice, or yes or no.
      options: the texts of A, B, C, ...
      index: the row's own number or name. MMBench: the same modulo 1,000,000 = one question with its options rotated.
        HallusionBench: prefix_category_l2-category_set_figure_question.
      category, l2_category: what has a score of its own.
      split: the part of the data, where it has a score of its own (ChartQA's human and augmented questions).
      image: whose two questions are one pair (MME).
      dataset: where OCRBench has the row from.
      question_type_id: SEED's, 1 to 12.
    """

    prediction: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    index: int | str = ""
    category: str = ""
    l2_category: str = ""
    split: str = ""
    image: str = ""
    dataset: str = ""
    question_type_id: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Case":
        """A case of a row with these fields; also 'answer' for one reference or a list, and 'l2-category'.

        What the row lacks or has as None is empty; numbers among answers and options become texts.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"answers", "options", "l2_category"}
        given: dict[str, Any] = {"prediction": ""}
        given |= {name: row[name] for name in fields if row.get(name) is not None}
        return cls(
            answers=_texts(row.get("answers", row.get("answer"))),
            options=_texts(row.get("options")),
            l2_category=row.get("l2-category") or row.get("l2_category") or "",
            **given,
        )


def _texts(given):
    if given is None:
        return ()
    return tuple(map(str, given)) if isinstance(given, list | tuple) else (str(given),)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule reads out of an answer, and the answer's score.

    Attributes:
      extracted: an option's letter, a yes or no, candidates, a normalised text; None = nothing could be inferred.
      score: 0 to 1.
    """

    extracted: Any
    score: float


Scored = Sequence[tuple[Case, Verdict]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How a rule set scores a benchmark.

    Attributes:
      score: a case -> what is read out of its answer, and its score.
      aggregate: all cases with their verdicts -> what the original reports, in its names and units (percent or
        fraction). None where the original scores nothing itself but writes a submission.
      main: what `aggregate` returned -> the number that stands for the benchmark, as the original scales it.
      metric: what that number is called.
      full: that number where every answer is right: 1 = a fraction, 100 = percent.
      needs: the fields of a case that must not be empty, besides the prediction and the answers.
      unit: a case -> what it stands or falls with: cases of one unit stay together where a part is scored. None = those
        of one index.
      sums: the number grows with the cases, as points do; else it is a mean, a share or the like.
    """

    score: Callable[[Case], Verdict]
    aggregate: Callable[[Scored], dict[str, Any]] | None
    main: Callable[[dict[str, Any]], float]
    metric: str
    full: float = 1
    needs: tuple[str, ...] = ()
    unit: Callable[[Case], Hashable] | None = None
    sums: bool = False

    def number(self, scored: Scored) -> float:
        """The number that stands for the benchmark, of cases that are scored. Not for a rule without `aggregate`."""
        assert self.aggregate is not None, self.metric
        return self.main(self.aggregate(scored))

    def check(self, case: Case) -> None:
        """Raises UserError for a case that lacks a field which the rule needs."""
        missing = [name for name in ("answers", *self.needs) if getattr(case, name) in ((), getattr(Case, name, ()))]
        if missing:
            raise UserError(f"the row {case.index!r} has no {' and no '.join(missing)}, which {self.metric} needs")
