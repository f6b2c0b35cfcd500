"""MMBench: circular evaluation, a question counts where it is right in every rotation of its options.

Liu et al., "MMBench", 2024, section 4.
"""

from collections.abc import Sequence
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.evaluation.rules.case import Case, Scored, Verdict
from hovle_jax.evaluation.rules.options import FAILED, LETTERS, only
from hovle_jax.evaluation.rules.reports import grouped, mean

ROTATIONS = 1_000_000  # rows whose index is the same modulo this are one question
SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}

# ---------------------------------------------------------------------------------------------------------------------
# lmms-eval's ways to read an answer

FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
MOST_LETTERS = 5  # A to E are looked for, whatever the number of options
MOST_OPTIONS = 4
QUANTIFIER = 3  # an answer of more words may use A as an article
NO_TEXT = "nan"  # an option that is not there; so a 'banana' contains option C of a question of two
AROUND = ",.!?;:'\""
# More than one form: the highest of these wins, of one form the last in the answer.
PRIORITIES = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
AT_THE_BEGINNING, AT_THE_END, IN_A_PHRASE, ANYWHERE = 10, 9, 7, 0
PHRASES = (
    *(f"{start}answer is" for start in ("the ", "", "the correct ", "correct ", "the best ", "best ", "my ")),
    *(f"{start}option is" for start in ("the correct ", "correct ", "the best ", "best ")),
    *(f"{start}choice is" for start in ("the ", "", "the correct ", "correct ", "my ")),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def prefetched(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that an answer names by its letter, else by its text; None where it is not clear."""
    missing = [NO_TEXT] * (MOST_OPTIONS - len(options))
    return _by_letter(answer) or _by_text(answer, [*options[:MOST_OPTIONS], *missing])


def _by_letter(answer):
    if FAILED in answer:
        return None
    words, letters = answer.split(), LETTERS[:MOST_LETTERS]
    alone = only(letter for letter in letters if letter in words)
    if alone and not ("A" in words and len(words) > QUANTIFIER):
        return alone
    found = (only(letter for letter in letters if form.format(letter) in words) for form in FORMS)
    return next(filter(None, found), None)


def _by_text(answer, options):
    texts = zip(LETTERS, options, strict=False)
    return only(letter for letter, option in texts if option.lower() in answer.lower())


def extracted(answer: str, letters: Sequence[str] = tuple(LETTERS[:MOST_OPTIONS])) -> str | None:
    """The letter that an answer of more words ends up with, by the surest of many forms; None for no letter at all."""
    text = answer.strip()
    for mark in AROUND:
        text = text.strip(mark)
    text = f" {text} "
    found = [
        (priority, text.rfind(form.format(letter)), letter)
        for form, priority in PRIORITIES.items()
        for letter in letters
        if form.format(letter) in text
    ]
    found += _in_phrases(text, letters) + _at_the_sides(text, letters)
    found = found or [(ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda one: one[:2])[2] if answer.strip() and found else None


def _in_phrases(text, letters):
    starts = {phrase: text.lower().find(phrase) for phrase in PHRASES}
    ends = [start + len(phrase) for phrase, start in starts.items() if start >= 0]
    places = [(text.find(letter, end), letter) for end in ends for letter in letters]
    return [(IN_A_PHRASE, place, letter) for place, letter in places if place >= 0]


def _at_the_sides(text, letters):
    """The letters with which the answer begins and ends, where they are no part of a word."""
    inside, found = text.strip(), []
    if inside[:1] in letters and not inside[1:2].isalpha():
        found.append((AT_THE_BEGINNING, 0, inside[:1]))
    if inside[-1:] in letters and not inside[-2:-1].isalpha():
        found.append((AT_THE_END, len(text) - 1, inside[-1:]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Circular evaluation


def score_lmms_eval(case: Case) -> Verdict:
    """Read by `prefetched`, else by `extracted` (lmms-eval's static evaluation, without a judge)."""
    found = prefetched(case.prediction, case.options)
    letter = found or extracted(case.prediction)
    return Verdict(found, float(letter == case.answers[0]))


def hits(scored: Scored) -> list[tuple[Case, int]]:
    """[(a question's first row, 1 where all of its rotations are right)], by index; none without its first row."""
    questions = grouped(scored, lambda item: question_of(item[0]))
    firsts = {_number(case.index): case for case, _ in scored if _number(case.index) < ROTATIONS}
    right = {index: all(verdict.score == 1 for _, verdict in rows) for index, rows in questions.items()}
    return [(firsts[index], int(right[index])) for index in sorted(firsts)]


def question_of(case: Case) -> int:
    """The number that the rotations of one question share. Raises UserError for an index that is no number."""
    return _number(case.index) % ROTATIONS


def _number(index):
    try:
        return int(index)
    except ValueError as error:
        raise UserError(f"MMBench's index {index!r} is no number, so no rotations can be told: take its own") from error


def circular_vlmevalkit(scored: Scored) -> dict[str, Any]:
    """Fractions: of all questions, each l2-category (by its short name) and each category; a list of several splits."""
    found = hits(scored)
    splits = grouped(found, lambda hit: hit[0].split or "none")
    rows = [_fractions(cases) for cases in splits.values()]
    names = dict.fromkeys(name for row in rows for name in row)
    table = {"split": list(splits)} | {name: [row.get(name) for row in rows] for name in names}
    one = len(splits) == 1
    return {"group_hit": _group_hit(found), "accuracy": {name: row[0] if one else row for name, row in table.items()}}


def _fractions(found):
    parts = {"Overall": found}
    for level in ("l2_category", "category"):
        groups = grouped(found, lambda hit: getattr(hit[0], level))
        parts |= {SHORT.get(name, name): groups[name] for name in sorted(groups) if name}
    return {name: mean(hit for _, hit in part) for name, part in parts.items()}


def _group_hit(found):
    return {str(case.index): hit for case, hit in found}


def circular_lmms_eval(scored: Scored) -> dict[str, Any]:
    """Fractions: 'overall', and of each category and l2-category."""
    found = hits(scored)
    report: dict[str, Any] = {"overall": mean(hit for _, hit in found)}
    for level in ("category", "l2_category"):
        groups = grouped(found, lambda hit: getattr(hit[0], level))
        report[level] = {part: mean(hit for _, hit in groups[part]) for part in sorted(groups) if part}
    return report | {"group_hit": _group_hit(found)}
