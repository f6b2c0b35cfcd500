"""Questions of yes or no: POPE, MME and HallusionBench, how an answer is read and what is reported."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.evaluation.rules.case import Case, Scored, Verdict
from hovle_jax.evaluation.rules.reports import grouped, mean
from hovle_jax.evaluation.vqa_text import without_punctuation

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
CHINESE = {"不是": "No", "是": "Yes", "否": "No"}  # the longest first
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fa5]")

# ---------------------------------------------------------------------------------------------------------------------
# How an answer is read


def word(answer: str) -> str:
    """VLMEvalKit: 'Yes' or 'No' where one of them is a word of the answer and the other is not, else 'Unknown'."""
    words = without_punctuation(answer.lower()).split()
    return {(True, False): "Yes", (False, True): "No"}.get(("yes" in words, "no" in words), "Unknown")


def first_sentence(answer: str) -> str:
    """InternVL's POPE: 'no' where 'No', 'no' or 'not' is a word of the first sentence; everything else is 'yes'."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def beginning(answer: str) -> str:
    """'yes' or 'no' where the first four characters contain it, 'yes' first; else 'other'."""
    return next((label for label in ("yes", "no") if label in answer[:4]), "other")


def beginning_lmms_eval(answer: str) -> str:
    """lmms-eval's MME: `beginning` of the answer without full stops and blanks around; a lone 'y' or 'n' counts."""
    answer = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(answer) or beginning(answer)


def beginning_internvl(answer: str) -> str:
    """InternVL's MME: `beginning` once true, false and the Chinese words are yes and no; other Chinese is dropped.

    A tab in an answer breaks a line of InternVL's file, which then counts for nothing; here it is a character.
    """
    answer = answer.replace("\n", "")
    for chinese, english in CHINESE.items():
        answer = answer.replace(chinese, english)
    answer = answer.lower().replace("true", "yes").replace("false", "no")
    return beginning(CHINESE_CHARACTER.sub("", answer))


def whole(answer: str) -> str:
    """lmms-eval's POPE: the whole answer; so 'Yes.' is neither yes nor no."""
    return answer.lower().strip()


def read_by(read: Callable[[str], str]) -> Callable[[Case], Verdict]:
    """A scorer: 1 where what is read out of the answer is the reference, in any case."""

    def score(case: Case) -> Verdict:
        found = read(case.prediction)
        return Verdict(found, float(found.lower() == case.answers[0].strip().lower()))

    return score


# ---------------------------------------------------------------------------------------------------------------------
# POPE


def _f1(pairs: Sequence[tuple[bool, bool | None]]) -> tuple[float, float, float]:
    """(F1, precision, recall) of (is yes, said yes); said None = neither, which recall does not count. 0 for 0/0."""
    hits = pairs.count((True, True))
    precision = hits / max(1, hits + pairs.count((False, True)))
    recall = hits / max(1, hits + pairs.count((True, False)))
    return (2 * precision * recall / (precision + recall) if hits else 0.0), precision, recall


def _is_yes(case):
    return case.answers[0].strip().lower() == "yes"


def pope_vlmevalkit(scored: Scored) -> dict[str, Any]:
    """F1 ('Overall'), accuracy, precision and recall in percent, of all cases and of each category.

    A case of several categories ('random,popular') counts in each, and so often in all. What is neither yes nor no is
    taken for no, except by the accuracy.
    """
    spread = [(name, case, verdict) for case, verdict in scored for name in case.category.split(",")]

    def row(cases):
        f1, precision, recall = _f1([(_is_yes(case), verdict.extracted == "Yes") for _, case, verdict in cases])
        accuracy = mean(verdict.score for *_, verdict in cases)
        shares = dict(Overall=f1, acc=accuracy, precision=precision, recall=recall)
        return {name: 100 * share for name, share in shares.items()}

    categories = grouped(spread, lambda item: item[0])
    return {"rating": {"Overall": row(spread)} | {name: row(cases) for name, cases in categories.items() if name}}


def pope_lmms_eval(scored: Scored) -> dict[str, Any]:
    """Fractions of all cases together; recall leaves out what is neither yes nor no; yes_ratio is of the references."""
    said = {"yes": True, "no": False}
    pairs = [(_is_yes(case), said.get(verdict.extracted)) for case, verdict in scored]
    f1, precision, recall = _f1(pairs)
    yes = mean(is_yes for is_yes, _ in pairs)
    return dict(accuracy=_accuracy(scored), precision=precision, recall=recall, f1=f1, yes_ratio=yes)


def pope_internvl(scored: Scored) -> dict[str, Any]:
    """F1 of each category, and their mean in percent. InternVL stops at 0/0, which counts 0 here."""
    categories = grouped(scored, lambda item: item[0].category)
    f1 = {
        name: _f1([(_is_yes(case), verdict.extracted == "yes") for case, verdict in cases])[0]
        for name, cases in categories.items()
    }
    return {"f1": f1, "overall_f1": 100 * mean(f1.values())}


def _accuracy(scored):
    return mean(verdict.score for _, verdict in scored)


# ---------------------------------------------------------------------------------------------------------------------
# MME


def image_of(case: Case) -> tuple[str, str]:
    """The image whose two questions are one pair."""
    return case.category, case.image


def mme_categories(scored: Scored) -> dict[str, float]:
    """{category: accuracy + accuracy+}, 0 to 200; accuracy+ is the share of images with both questions right.

    Fu et al., "MME", 2023, section 2.2. Raises UserError for an image without two questions.
    """
    return {name: _mme_points(name, cases) for name, cases in grouped(scored, lambda item: item[0].category).items()}


def _mme_points(category, cases):
    images = grouped(cases, lambda item: item[0].image)
    for image, pair in images.items():
        if len(pair) != 2:
            remedy = "MME is scored in pairs: take whole images"
            raise UserError(f"{category}: the image {image!r} has {len(pair)} question(s), not 2; {remedy}")
    both = mean(all(verdict.score for _, verdict in pair) for pair in images.values())
    return 100 * _accuracy(cases) + 100 * both


def _sums(points, **parts):
    return {name: sum(points[category] for category in part if category in points) for name, part in parts.items()}


def mme_vlmevalkit(scored: Scored) -> dict[str, Any]:
    """The sums 'perception' (of 2000) and 'reasoning' (of 800), and each category."""
    points = mme_categories(scored)
    return _sums(points, perception=PERCEPTION, reasoning=COGNITION) | points


def mme_lmms_eval(scored: Scored) -> dict[str, Any]:
    """The sums and, under 'categories', each category. What is no category of perception is one of cognition."""
    points = mme_categories(scored)
    cognition = [name for name in points if name not in PERCEPTION]
    sums = _sums(points, mme_perception_score=PERCEPTION, mme_cognition_score=cognition)
    return sums | {"categories": points}


def mme_internvl(scored: Scored) -> dict[str, Any]:
    """The sums 'perception' and 'cognition' and, under 'categories', each category."""
    points = mme_categories(scored)
    return _sums(points, perception=PERCEPTION, cognition=COGNITION) | {"categories": points}


# ---------------------------------------------------------------------------------------------------------------------
# HallusionBench


def set_of(case: Case) -> tuple[str, str]:
    """The set of figures that share their questions. Raises UserError for an index of another form."""
    return case.l2_category, _hallusion_place(case.index)[0]


def hallusion_vlmevalkit(scored: Scored) -> dict[str, Any]:
    """aAcc, fAcc and qAcc in percent: of all cases, of each category (VD, VS) and of each l2-category.

    aAcc: the share of right answers; fAcc: of figures with all their questions right; qAcc: of questions that are right
    of all their figures (Guan et al., "HallusionBench", 2024).
    """
    rating = {"Overall": _hallusion(scored)}
    for level in ("category", "l2_category"):
        parts = grouped(scored, lambda item: getattr(item[0], level))
        rating |= {name: _hallusion(cases) for name, cases in parts.items() if name}
    return {"rating": rating}


def _hallusion(scored):
    figures, questions = defaultdict(list), defaultdict(list)
    for case, verdict in scored:
        set_id, figure, question = _hallusion_place(case.index)
        figures[case.l2_category, set_id, figure].append(verdict.score == 1)
        questions[case.l2_category, set_id, question].append(verdict.score == 1)
    whole_of = {"fAcc": figures, "qAcc": questions}
    return {"aAcc": 100 * _accuracy(scored)} | {
        name: 100 * mean(all(hits) for hits in groups.values()) for name, groups in whole_of.items()
    }


def _hallusion_place(index):
    parts = str(index).split("_")
    if len(parts) < 6:
        form = "prefix_category_l2-category_set_figure_question"
        raise UserError(f"HallusionBench's index {index!r} is not of the form {form}: take VLMEvalKit's rows")
    return parts[3:6]
