"""Scorers: how right an answer is, from 0 to 1, given the references and, for multiple choice, the options.

They are for data of your own. How the public collections of benchmarks score is in `rules/`, from which these take what
they have in common.
"""

from collections.abc import Callable, Sequence

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.evaluation.rules.options import LETTERS, inferred
from hovle_jax.evaluation.rules.short_answers import AGREEING, agreement, close, cut, similarity
from hovle_jax.evaluation.vqa_text import normalised
from hovle_jax.report.page import plain

# (answer, references, options) -> 0 to 1. Raises BadSample for references and options that it cannot score.
Scorer = Callable[[str, Sequence[str], Sequence[str]], float]


def exact(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the answer is a reference but for the case of letters, blanks and a full stop at the end."""
    return float(any(plain(answer) == plain(reference) for reference in references))


def relaxed(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """ChartQA's relaxed accuracy: a number may be 5% off its reference, other answers are right but for their case.

    Blanks around an answer do not count, as in VLMEvalKit, nor around a reference (`short_answers.close`).
    """
    return float(any(close(answer.strip(), reference.strip()) for reference in references))


def anls(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity, of the most similar reference; below 0.5 it is 0.

    Biten et al., "Scene Text Visual Question Answering", 2019, equation 1. In the paper a similarity of 0.5 counts 0;
    DocVQA's server and the public rule sets let it count. Case and the number of blanks do not count, as in VLMEvalKit.
    """
    return cut(max(similarity(answer, reference) for reference in references))


def vqa(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """VQA's soft accuracy: an answer is right if 3 of the other people gave it, averaged over whom one leaves out.

    Texts are normalised as by EvalAI's server, which lmms-eval and InternVL follow. For fewer than four references, of
    which three others cannot agree, as many as there are must; one alone is right or wrong.
    """
    given = normalised(answer)
    matches = [normalised(reference) == given for reference in references]
    return float(matches[0]) if len(matches) == 1 else agreement(matches, min(AGREEING, len(matches) - 1))


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
    """The index of the one option that an answer names by VLMEvalKit's rule (`options.inferred`); None if not clear."""
    letter = inferred(answer, options)
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(options)] else None


SCORERS: dict[str, Scorer] = {"exact": exact, "relaxed": relaxed, "anls": anls, "choice": choice, "vqa": vqa}


def find(name: str) -> Scorer:
    """A scorer by its name. Raises UserError where there is none."""
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}; use one of {', '.join(SCORERS)}")
    return SCORERS[name]
