"""What most rule sets report: the mean of the scores, of all cases and of their parts."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from hovle_jax.evaluation.rules.case import Scored

T = TypeVar("T")
TEXT_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
OTHER_PARTS = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    """{key: its items}, in the order in which the keys appear."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def overall(*levels: str, name: str = "overall", scale: float = 1) -> Callable[[Scored], dict[str, Any]]:
    """An aggregate: the mean score of all cases under `name`, and of each part.

    Args:
      levels: the fields of a case whose values are parts of their own where they are not empty.
      name: of the mean of all cases.
      scale: 100 = percent.
    """

    def aggregate(scored: Scored) -> dict[str, Any]:
        parts = {name: list(scored)}
        for level in levels:
            found = grouped(scored, lambda item: getattr(item[0], level))
            parts |= {part: cases for part, cases in found.items() if part}
        return {part: scale * mean(verdict.score for _, verdict in cases) for part, cases in parts.items()}

    return aggregate


def splits_or_categories(scored: Scored) -> dict[str, Any]:
    """VLMEvalKit's short answers, in percent: all, and each split; without splits each category."""
    has_splits = any(case.split for case, _ in scored)
    return overall("split" if has_splits else "category", scale=100)(scored)


def mean_of_splits(scored: Scored) -> dict[str, Any]:
    """InternVL's ChartQA: the two splits are two runs; their mean is what papers report."""
    splits = grouped(scored, lambda item: item[0].split)
    means = {name: mean(verdict.score for _, verdict in cases) for name, cases in splits.items()}
    return means | {"mean_of_splits": mean(means.values())}


def seed_internvl(scored: Scored) -> dict[str, Any]:
    """InternVL's SEED in percent with two decimals: all, image questions (types 1 to 9), video (10 to 12), each type.

    InternVL stops where there is no question of a part; here the part is left out.
    """

    def percent(cases):
        return round(100 * mean(verdict.score for _, verdict in cases), 2)

    kinds = grouped(scored, lambda item: "Image" if 1 <= item[0].question_type_id <= 9 else "Video")
    types = grouped(scored, lambda item: item[0].question_type_id)
    return {
        "accuracy_percent": {"Total": percent(scored)} | {kind: percent(kinds[kind]) for kind in sorted(kinds)},
        "type_percent": {f"t{number}": percent(types[number]) for number in sorted(types)},
    }


def ocrbench_vlmevalkit(scored: Scored) -> dict[str, Any]:
    """How many are right, of each part; of all 1,000 questions ('Final Score'), and a tenth of it ('... Norm')."""
    right = {part: _right(scored, (part,)) for part in OTHER_PARTS}
    parts = {"Text Recognition": _right(scored, TEXT_RECOGNITION)} | right
    final = sum(parts.values())
    return parts | {"Final Score": final, "Final Score Norm": final / 10}


def ocrbench_lmms_eval(scored: Scored) -> dict[str, Any]:
    """How many are right. lmms-eval divides it by 1,000, the number of questions in the whole benchmark."""
    return {"total": _right(scored, TEXT_RECOGNITION + OTHER_PARTS)}


def _right(scored: Scored, categories: Sequence[str]) -> int:
    return sum(int(verdict.score) for case, verdict in scored if case.category in categories)
