"""Scorers: how right an answer is, from 0 to 1, given the references and, for multiple choice, the options.

`VLMEvalKit` and `lmms-eval` are the public collections of benchmarks whose rule sets are meant; a scorer says which one
it follows where they differ.
"""

import string
from collections.abc import Callable, Sequence

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.evaluation.vqa_text import normalised
from hovle_jax.report.page import plain

# (answer, references, options) -> 0 to 1. Raises BadSample for references and options that it cannot score.
Scorer = Callable[[str, Sequence[str], Sequence[str]], float]

TOLERANCE = 0.05  # relaxed: of a number
SIMILAR_ENOUGH = 0.5  # anls
AGREEING = 3  # vqa: so many people of the same answer make it right
LETTERS = string.ascii_uppercase


def exact(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the answer is a reference but for the case of letters, blanks and a full stop at the end."""
    return float(any(plain(answer) == plain(reference) for reference in references))


def relaxed(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """ChartQA's relaxed accuracy: a number may be 5% off its reference, other answers are right but for their case.

    Masry et al., "ChartQA", 2022, section 5.1; a percentage is a fraction, and beside a reference of 0 the texts are
    compared, as in the code of Pix2Struct that VLMEvalKit and lmms-eval have in common. Blanks around an answer do not
    count, as in VLMEvalKit.
    """
    return float(any(_relaxed(answer.strip(), reference.strip()) for reference in references))


def _relaxed(answer, reference):
    got, expected = _number(answer), _number(reference)
    if got is not None and expected:
        return abs(got - expected) <= TOLERANCE * abs(expected)
    return answer.lower() == reference.lower()


def _number(text):
    """'1200.0', '1e3', '50%' as a float; None for what is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity, of the most similar reference; below 0.5 it is 0.

    Biten et al., "Scene Text Visual Question Answering", 2019, equation 1. In the paper a similarity of 0.5 counts 0;
    DocVQA's server, VLMEvalKit and lmms-eval let it count. Case and the number of blanks do not count.
    """
    similarity = max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)
    return similarity if similarity >= SIMILAR_ENOUGH else 0.0


def _spaced(text):
    return " ".join(text.lower().split())


def _similarity(a, b):
    longest = max(len(a), len(b))
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of characters that make b of a."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (one != other))
    return row[-1]


def vqa(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """VQA's soft accuracy: an answer is right if 3 of the other people gave it, averaged over whom one leaves out.

    Antol et al., "VQA", 2015, section 5, as visualqa.org/evaluation.html averages it over the ten choices of nine
    people. Texts are normalised as by EvalAI's server, which lmms-eval and InternVL follow; VLMEvalKit differs in full
    stops after a word. For fewer than four references, of which three others cannot agree, as many as there are must;
    one alone is right or wrong.
    """
    given, same = normalised(answer), [normalised(reference) for reference in references]
    matches = [one == given for one in same]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(AGREEING, len(matches) - 1)
    return sum(min(1.0, (sum(matches) - left_out) / needed) for left_out in matches) / len(matches)


def choice(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Multiple choice: 1 where the option that an answer names is the reference, which is a letter or an option's text.

    An answer that as a whole is a letter or the text of an option, in any case, names that option: a rule of our own.
    Others are read by VLMEvalKit's rule without a judge (`inferred_option`); what names none is wrong. A text that is
    both a letter and an option is taken for the letter.
    """
    if len(options) < 2:
        raise BadSample("no_options", "multiple choice needs two texts or more under 'options' or 'choices'")
    right = {whole_option(reference, options) for reference in references}
    if None in right:
        raise BadSample("not_an_option", f"its answer is neither the text nor the letter of one of {list(options)}")
    named = whole_option(answer, options)
    return float((inferred_option(answer, options) if named is None else named) in right)


def whole_option(text: str, options: Sequence[str]) -> int | None:
    """The index of the option whose letter or text this is: 'b', '(B)', 'B.', 'a dog'."""
    letter = text.strip(" \n().:").upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return LETTERS.index(letter)
    return next((i for i, option in enumerate(options) if plain(text) == plain(option)), None)


def inferred_option(answer: str, options: Sequence[str]) -> int | None:
    """The index of the one option that an answer names by its letter, else by its text; None where that is not clear.

    After VLMEvalKit's `can_infer`: a capital letter counts among the last five words, a text in an answer that is no
    longer than twice all options.
    """
    letters = LETTERS[: len(options)]
    words = answer.translate({ord(mark): " " for mark in ".()[],:;!*#{}"}).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return letters.index(named[0])
    if len(answer) > 2 * sum(map(len, options)):
        return None
    found = [i for i, option in enumerate(options) if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


SCORERS: dict[str, Scorer] = {"exact": exact, "relaxed": relaxed, "anls": anls, "choice": choice, "vqa": vqa}


def find(name: str) -> Scorer:
    """A scorer by its name. Raises UserError where there is none."""
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}; use one of {', '.join(SCORERS)}")
    return SCORERS[name]
