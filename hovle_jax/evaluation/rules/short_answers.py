"""Short answers: ChartQA's relaxed accuracy, ANLS, VQA's soft accuracy, GQA's and OCRBench's plain comparison."""

import string
from collections.abc import Callable, Sequence

from hovle_jax.evaluation.rules.case import Case, Verdict
from hovle_jax.evaluation.vqa_text import normalised, normalised_vlmevalkit

TOLERANCE = 0.05  # ChartQA: of a number
SIMILAR_ENOUGH = 0.5  # ANLS
AGREEING = 3  # VQA: so many people of the same answer make it right
ANY_PUNCTUATION = str.maketrans("", "", string.punctuation)
MATHEMATICS = "Handwritten Mathematical Expression Recognition"
# The printable ASCII characters in the width of a Chinese one, and the blank of that width.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}

# ---------------------------------------------------------------------------------------------------------------------
# ChartQA


def close(answer: str, reference: str) -> bool:
    """Whether a number is at most 5% off its reference, or another text is the reference but for its case.

    Masry et al., "ChartQA", 2022, section 5.1; a percentage is a fraction, and beside a reference of 0 the texts are
    compared, as in the code of Pix2Struct that the three rule sets have in common.
    """
    got, expected = _number(answer), _number(reference)
    if got is not None and expected:
        return abs(got - expected) / abs(expected) <= TOLERANCE
    return answer.lower() == reference.lower()


def _number(text):
    """'1200.0', '1e3', '50%' as a float; None for what is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_vlmevalkit(case: Case) -> Verdict:
    """Blanks around the answer do not count; the best of the references."""
    answer = case.prediction.strip()
    return Verdict(answer, float(any(close(answer, reference) for reference in case.answers)))


def relaxed_lmms_eval(case: Case) -> Verdict:
    """The answer as it stands, with blanks around it; the best of the references."""
    return Verdict(case.prediction, float(any(close(case.prediction, reference) for reference in case.answers)))


def relaxed_internvl(case: Case) -> Verdict:
    """The 5% are those of the answer, not of the reference: InternVL's call has the two the other way round.

    So 44.1 is right for 42, and beside an answer of 0 the texts are compared.
    """
    answer = case.prediction.strip()
    return Verdict(answer, float(any(close(reference, answer) for reference in case.answers)))


# ---------------------------------------------------------------------------------------------------------------------
# DocVQA, InfoVQA


def similarity(a: str, b: str, longest: int | None = None) -> float:
    """1 - edit distance / length of the longer text; case and the number of blanks do not count.

    `longest` is another length to divide by than that of the texts with single blanks.
    """
    a, b = (" ".join(text.lower().split()) for text in (a, b))
    longest = max(len(a), len(b)) if longest is None else longest
    return 1 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of characters that make b of a."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (one != other))
    return row[-1]


def cut(best: float) -> float:
    """ANLS: a similarity below 0.5 counts nothing (Biten et al., 2019, equation 1, where 0.5 itself counts nothing)."""
    return best if best >= SIMILAR_ENOUGH else 0.0


def anls_vlmevalkit(case: Case) -> Verdict:
    """The most similar reference, 0 below 0.5; lengths are those of the texts with single blanks."""
    return Verdict(case.prediction, cut(max(similarity(case.prediction, reference) for reference in case.answers)))


def anls_of_raw_lengths(case: Case) -> Verdict:
    """The same, but divided by the length of the texts as they stand: lmms-eval and InternVL, after DocVQA's script."""

    def raw(reference):
        return similarity(case.prediction, reference, max(len(reference.upper()), len(case.prediction.upper())))

    return Verdict(case.prediction, cut(max(map(raw, case.answers))))


# ---------------------------------------------------------------------------------------------------------------------
# TextVQA


def agreement(matches: Sequence[bool], needed: int = AGREEING) -> float:
    """VQA's soft accuracy of an answer that so many people gave: min(1, others / 3), averaged over whom one leaves out.

    Antol et al., "VQA", 2015, section 5, as visualqa.org/evaluation.html averages it over the ten choices of nine.
    """
    return sum(min(1.0, (sum(matches) - left_out) / needed) for left_out in matches) / len(matches)


def soft_accuracy(write: Callable[[str], str]) -> Callable[[Case], Verdict]:
    """A scorer of `agreement` that compares the texts as `write` writes them.

    InternVL stops where a question has not ten references; here they are scored alike, of however many there are.
    """

    def score(case: Case) -> Verdict:
        answer = write(case.prediction)
        return Verdict(answer, agreement([write(reference) == answer for reference in case.answers]))

    return score


vqa_eval_ai = soft_accuracy(normalised)
vqa_vlmevalkit = soft_accuracy(normalised_vlmevalkit)

# ---------------------------------------------------------------------------------------------------------------------
# GQA


def equal_vlmevalkit(case: Case) -> Verdict:
    """Equal but for case and blanks around; the mean over the references."""
    answer = case.prediction.strip().lower()
    hits = [answer == reference.strip().lower() for reference in case.answers]
    return Verdict(answer, sum(hits) / len(hits))


def equal_lmms_eval(case: Case) -> Verdict:
    """Equal but for case and punctuation; blanks count."""
    answer, *references = (text.lower().translate(ANY_PUNCTUATION) for text in (case.prediction, *case.answers))
    return Verdict(answer, float(answer in references))


def equal_internvl(case: Case) -> Verdict:
    """Equal once the answer is in lower case and without full stops at its end; the reference stays as it is.

    InternVL converts the answers; the comparison is that of the authors' own script.
    """
    answer = case.prediction.rstrip(".").lower()
    return Verdict(answer, float(answer in case.answers))


def exact_internvl(case: Case) -> Verdict:
    """Equal but for case and blanks around. AI2D: the answer must be the bare letter, 'a' or 'A' but not 'A.'."""
    answer = case.prediction.strip().lower()
    return Verdict(answer, float(any(answer == reference.strip().lower() for reference in case.answers)))


# ---------------------------------------------------------------------------------------------------------------------
# OCRBench


def contained_vlmevalkit(case: Case) -> Verdict:
    """1 where the answer contains a reference: formulas without any blank, other texts without regard to case."""
    return _contained(case, case.category == MATHEMATICS, str.lower)


def contained_lmms_eval(case: Case) -> Verdict:
    """The same, with characters of full width as those of ASCII; formulas are told by their source, HME100k."""
    formula = case.dataset == "HME100k" if case.dataset else case.category == MATHEMATICS
    return _contained(case, formula, lambda text: text.translate(FULL_WIDTH).lower())


def _contained(case, formula, fold):
    def write(text):
        text = (text.strip() if formula else fold(text).strip()).replace("\n", " ")
        return text.replace(" ", "") if formula else text

    answer = write(case.prediction)
    return Verdict(answer, float(any(write(reference) in answer for reference in case.answers)))
