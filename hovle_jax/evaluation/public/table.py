"""The public benchmarks: what each reads from its TSV, how it is asked, and who scores it."""

import dataclasses
from collections.abc import Sequence

from hovle_jax.evaluation import rules
from hovle_jax.evaluation.benchmark import Benchmark
from hovle_jax.evaluation.public import prompts, submissions
from hovle_jax.evaluation.public.prompts import Words, tiled
from hovle_jax.evaluation.public.submissions import Layout
from hovle_jax.evaluation.rules.table import INTERNVL, VLMEVALKIT

LETTER, LETTER_OR_TEXT, YES_NO, TEXT, JUDGED = KINDS = ("letter", "letter or text", "yes or no", "text", "judged")
ROWS = "rows"  # a submission that has the TSV's columns and the predictions
TILES = 6
MOST_TILES_AT_ONCE = 192  # of a batch of questions with one image each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Public(Benchmark):
    """A row of the table (`benchmarks.py`) whose questions come from a TSV and whose answers a rule set scores.

    `metric` is what its default rule set reports.

    Attributes:
      title: its name in the rule sets.
      columns: those that the TSV must have beside index, question and an image.
      answer: what its answers are, one of KINDS. 'judged': free text, which only a judge model scores.
      words: an item -> what the model is asked; `prompt` adds the images and their tiles.
      max_tiles: of an image, as InternVL's published numbers have it.
      enlarged: of MMMU the first image is enlarged twice, as by VLMEvalKit's adapter of InternVL.
      rules: the rule set that scores it unless another one is named.
      split: the data's split, where the TSV does not say it.
      only: the TSV's splits that are asked where it has one of them; empty = all.
      server: who scores what is not scored here; empty = nobody.
      submission: the layout of the file for `server`; ROWS = the TSV's rows with the predictions.
    """

    title: str
    columns: tuple[str, ...] = ()
    answer: str = TEXT
    words: Words = prompts.in_a_word
    max_tiles: int = TILES
    enlarged: int = 1
    rules: str = VLMEVALKIT
    split: str = "test"
    only: Sequence[str] = ()
    server: str = ""
    submission: Layout | str = ""


def _row(title: str, **more) -> Public:
    row = Public(items=tuple, title=title, **more)  # `run.evaluate_tsv` has the items
    judged = row.answer == JUDGED
    return dataclasses.replace(
        row,
        prompt=tiled(row.words, row.max_tiles, row.enlarged),
        metric="judged" if judged else rules.find(title, row.rules).metric,
        max_new_tokens=row.max_new_tokens if "max_new_tokens" in more else {YES_NO: 16, LETTER: 16}.get(row.answer, 64),
        batch_size=max(4, MOST_TILES_AT_ONCE // row.max_tiles),
    )


def _documents(title, **more):
    server = "the server at rrc.cvc.uab.es (test split)"
    return _row(title, split="val", max_new_tokens=100, server=server, submission=submissions.of_documents, **more)


def _choice(title, **more):
    return _row(title, **({"columns": ("A", "B"), "answer": LETTER, "words": prompts.by_letter} | more))


PUBLIC: dict[str, Public] = {
    "textvqa": _row("TextVQA", split="val"),
    "docvqa": _documents("DocVQA", max_tiles=18),
    "infovqa": _documents("InfoVQA", max_tiles=24),
    "chartqa": _row("ChartQA", max_tiles=12),
    "gqa": _row("GQA", split="testdev_balanced"),
    "ocrbench": _row("OCRBench", columns=("category",), max_tiles=24, max_new_tokens=128),
    # The published number is the mean of the three categories' F1, which InternVL's rules report.
    "pope": _row("POPE", columns=("category",), answer=YES_NO, words=prompts.as_asked, rules=INTERNVL),
    "mme": _row("MME", columns=("category", "image_path"), answer=YES_NO, words=prompts.in_a_word_on_its_line),
    "hallusionbench": _row(
        "HallusionBench", columns=("category", "l2-category"), answer=YES_NO, words=prompts.yes_or_no, split="image"
    ),
    "mmbench": _choice(
        "MMBench", split="dev", only=("dev",), server="MMBench's server (test split)", submission=ROWS
    ),
    "mmmu": _choice(
        "MMMU", answer=LETTER_OR_TEXT, split="validation", only=("validation",), max_tiles=12,
        enlarged=2,
    ),
    "seed": _choice("SEED", split="image"),
    "scienceqa": _choice("ScienceQA"),
    "ai2d": _choice("AI2D"),
    "mmvet": _row(
        "MM-Vet",
        answer=JUDGED,
        words=prompts.as_asked,
        max_new_tokens=512,
        server="MM-Vet's evaluator, a judge model",
        submission=submissions.of_mmvet,
    ),
    "mathvista": _row(
        "MathVista",
        answer=JUDGED,
        words=prompts.as_asked,
        split="testmini",
        max_new_tokens=512,
        server="MathVista's extract_answer.py, a judge model",
        submission=submissions.of_mathvista,
    ),
}  # fmt: skip
