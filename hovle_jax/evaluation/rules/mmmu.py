"""MMMU: the authors' parsers, which lmms-eval and InternVL have taken over, and VLMEvalKit's own way.

Yue et al., "MMMU", 2024; the parsers are those of `eval_utils.py` in the authors' repository.
"""

import re
from collections.abc import Callable, Sequence

from hovle_jax.evaluation.rules.case import Case, Verdict
from hovle_jax.evaluation.rules.options import LETTERS, inferred

AROUND = ",.!?;:'"
OPTION_WORDS = 5  # an answer of more words may name an option by its text
# Before these an answer is led up to; '=' also counts, in the last sentence.
LEADING_UP = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NO_ANSWER = frozenset(":,.!?;'")
NUMBERS = (
    re.compile(r"-?\b\d\d?\d?(?:,\d\d\d)+\b"),  # 12,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][-+]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][-+]?\d+)(?![\d,])"),  # 12, -1.2, .5
)
Candidate = float | str

# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


def letter(answer: str, options: Sequence[str], *forms: str) -> str | None:
    """The letter of the option that an answer names last, by the first of three ways that finds one; None for none.

    The ways: '(B)'; the letter in one of `forms`; the option's text, in an answer of more than five words. The original
    picks an option at random where none is found: an answer that is wrong here.
    """
    for mark in AROUND:
        answer = answer.strip(mark)
    answer, letters = f" {answer} ", LETTERS[: len(options)]
    for form, place in (("({})", "({})"), *((form, " {} ") for form in forms)):
        found = [one for one in letters if form.format(one) in answer]
        if found:
            return max(found, key=lambda one: answer.rfind(place.format(one)))
    if len(answer.split()) <= OPTION_WORDS:
        return None
    texts = {
        one: option.lower() for one, option in zip(letters, options, strict=True) if option.lower() in answer.lower()
    }
    return max(texts, key=lambda one: answer.lower().rfind(texts[one]), default=None)


def letter_lmms_eval(answer: str, options: Sequence[str]) -> str | None:
    """As the authors now do: a letter before a blank or a full stop, be it the end of a word (the A of 'CIA.')."""
    return letter(answer, options, "{} ", "{}.")


def letter_official(answer: str, options: Sequence[str]) -> str | None:
    """As the authors first did, and as InternVL's folder still has it without calling it: a letter between blanks."""
    return letter(answer, options, " {} ")


# ---------------------------------------------------------------------------------------------------------------------
# Open questions


def candidates(answer: str) -> tuple[Candidate, ...]:
    """The numbers and texts that an answer may mean, without repetition: numbers first, in order.

    Of each sentence what follows the last of the words that lead up to an answer, the shortest such end; without any
    the whole answer; and all numbers in those. lmms-eval and InternVL have it alike.
    """
    ends = _ends(answer.strip().strip(".").lower())
    texts = ends + [number for end in ends for form in NUMBERS for number in form.findall(end)]
    found = {candidate for text in texts for candidate in written(text)}
    return tuple(sorted(found, key=lambda one: (isinstance(one, str), one)))


def _ends(answer):
    """Sentences end with a line: the original's other sign, a capital after a full stop, is not in lower case."""
    lines = answer.split("\n")
    ends = []
    for i, line in enumerate(lines):
        words = LEADING_UP + ("=",) * (i == len(lines) - 1)
        found = [end for end in (line.split(word)[-1].strip() for word in words if word in line)]
        end = _shortest(found)
        if end and end not in NO_ANSWER:
            ends.append(end)
    return ends or [answer]


def _shortest(texts):
    """The first of the shortest; an empty one gives way to whatever comes next, as in the original."""
    best = ""
    for text in texts:
        if not best or len(text) < len(best):
            best = text
    return best


def written(text: str) -> tuple[Candidate, ...]:
    """A text as it is compared: a number with two decimals, or lower case; a lone letter with a blank beside it."""
    text = text.strip()
    try:
        return (round(float(text.replace(",", "")), 2),)
    except ValueError:
        text = text.lower()
        return (f" {text}", f"{text} ") if len(text) == 1 else (text,)


def open_answer(case: Case) -> Verdict:
    """1 where a candidate is a number of the references, or a text of the references is in a candidate."""
    found = candidates(case.prediction)
    references = [one for answer in case.answers for one in written(answer)]

    def right(candidate):
        if isinstance(candidate, float):
            return candidate in references
        return any(isinstance(one, str) and one in candidate for one in references)

    return Verdict(found, float(any(map(right, found))))


# ---------------------------------------------------------------------------------------------------------------------
# Both


def either(choice: Callable[[Case], Verdict], free: Callable[[Case], Verdict]) -> Callable[[Case], Verdict]:
    """A scorer of MMMU as a whole: `choice` for cases with options, `free` for the others."""
    return lambda case: (choice if case.options else free)(case)


def open_vlmevalkit(case: Case) -> Verdict:
    """VLMEvalKit makes an open question one of two options: A is the reference, B is 'Other Answers', and A is right.

    So a text that contains the reference is right unless it is too long. A reference that is itself a capital letter
    stays the letter that is asked for. Several references are the one text that they are in VLMEvalKit's file.
    """
    answer = case.answers[0] if len(case.answers) == 1 else str(list(case.answers))
    found = inferred(case.prediction, (answer, "Other Answers"))
    target = answer if len(answer) == 1 and answer in LETTERS else "A"
    return Verdict(found, float(found == target))
