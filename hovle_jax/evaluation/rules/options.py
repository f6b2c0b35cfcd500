"""Multiple choice: which option's letter a rule set reads out of an answer."""

import re
import string
from collections.abc import Callable, Iterable, Sequence

from hovle_jax.evaluation.rules.case import Case, Verdict
from hovle_jax.evaluation.rules.short_answers import ANY_PUNCTUATION

LETTERS = string.ascii_uppercase
NO_OPTION = "Z"  # VLMEvalKit's letter of an answer that refuses to choose
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"  # what the harnesses write in place of an answer that they did not get
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4
LEADING_LETTER = re.compile(r"\s*([A-Z])\.")

# ---------------------------------------------------------------------------------------------------------------------
# VLMEvalKit


def inferred(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that an answer names by its letter, else by its text; 'Z' for a refusal.

    VLMEvalKit's `can_infer`: a capital letter counts among the last four words, a text in an answer that is no
    longer than twice all options. None where that is not clear: without a judge the answer is wrong.
    """
    return _named_by_letter(answer, LETTERS[: len(options)]) or _named_by_text(answer, options)


def _named_by_letter(answer, letters):
    if FAILED in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return NO_OPTION
    words = answer.translate(MARKS).split()
    named = [letter for letter in letters if letter in words]
    if not named and NO_OPTION in words:
        return NO_OPTION
    one_at_the_end = len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS
    return named[0] if one_at_the_end else None


def _named_by_text(answer, options):
    short = len(answer.lower()) <= 2 * sum(map(len, options))
    return only(LETTERS[i] for i, option in enumerate(options) if option.lower() in answer.lower()) if short else None


def only(found: Iterable[str]) -> str | None:
    """The one thing that was found; None for none or several."""
    found = list(found)
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# InternVL


def leading(answer: str, options: Sequence[str]) -> str | None:
    """InternVL's post-processing: the first character where it is an option's letter, else the first option in it.

    Case counts. Without either it is the whole answer, as a lone character is. None for an empty answer, at which
    InternVL stops.
    """
    answer = answer.strip()
    if len(answer) <= 1:
        return answer or None
    if answer[0] in LETTERS[: len(options)]:
        return answer[0]
    return next((LETTERS[i] for i, option in enumerate(options) if option in answer), answer)


def leading_scienceqa(answer: str, options: Sequence[str]) -> str | None:
    """`leading`, and of an answer without an option the character before a full stop ('b. dog') or in brackets ('(B)').

    None for '(' and one more character, at which InternVL stops.
    """
    found = leading(answer, options) or ""
    if found[1:2] == ".":
        return found[0]
    if len(found) > 1 and found[0] == "(" and found[2:3] in ("", ")"):
        return found[1] if found[2:3] else None
    return found


def leading_of_stripped(answer: str, options: Sequence[str]) -> str | None:
    """`leading` with options without blanks around, as InternVL reads those of MMMU."""
    return leading(answer, [option.strip() for option in options])


def first_character(answer: str, options: Sequence[str] = ()) -> str | None:
    """InternVL's SEED: the first character, be it a blank. None for an empty answer, at which InternVL stops."""
    return answer[:1] or None


# ---------------------------------------------------------------------------------------------------------------------
# lmms-eval


def first_of_stripped(answer: str, options: Sequence[str] = ()) -> str:
    """lmms-eval's SEED: the first character that is no blank; it is compared without regard to case."""
    return answer.strip()[:1]


def before_a_full_stop(answer: str, options: Sequence[str] = ()) -> str:
    """lmms-eval's AI2D: a capital letter and a full stop at the beginning, else the whole answer."""
    found = LEADING_LETTER.match(answer)
    return found[1] if found else answer


def letter_ai2d(case: Case) -> Verdict:
    """`before_a_full_stop`, right where it is the reference but for case and punctuation: '(c)' is C."""
    found = before_a_full_stop(case.prediction)
    plain = [text.lower().translate(ANY_PUNCTUATION) for text in (found, *case.answers)]
    return Verdict(found, float(plain[0] in plain[1:]))


def letter_scienceqa(case: Case) -> Verdict:
    """lmms-eval's ScienceQA: the letter alone in either case, or a capital before a full stop ('B. dog')."""
    answer, target = case.prediction.strip(), case.answers[0].strip().lower()
    before_stop = len(answer) > 1 and answer[0].isupper() and answer[1] == "."
    found = answer[0] if before_stop and answer.lower() != target else answer
    return Verdict(found, float(found.lower() == target))


# ---------------------------------------------------------------------------------------------------------------------
# A scorer of a way to read


def read_by(read: Callable[[str, Sequence[str]], str | None], same_case: bool = True) -> Callable[[Case], Verdict]:
    """A scorer: 1 where what is read out of the answer is a reference; `same_case` = a capital where that has one."""

    def write(text):
        return text if same_case else text.lower().strip()

    def score(case: Case) -> Verdict:
        found = read(case.prediction, case.options)
        right = found is not None and write(found) in map(write, case.answers)
        return Verdict(found, float(right))

    return score
