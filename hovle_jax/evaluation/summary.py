"""What a finished run shows: its scores, sample answers beside their images, plots, its page and its chain's."""

import dataclasses
import json
import numbers
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.data.bad_samples import count_reasons, read_bad_samples
from hovle_jax.data.text.conversation import CAPTION_REQUEST, IMAGE_MARK
from hovle_jax.evaluation.benchmarks import evaluate
from hovle_jax.evaluation.easy_vqa import answer_kind
from hovle_jax.evaluation.intervals import ExactMatch
from hovle_jax.inference.generate import answer
from hovle_jax.inference.load import load_run
from hovle_jax.report.chain import write_chain
from hovle_jax.report.facts import versions
from hovle_jax.report.goodput import shares
from hovle_jax.report.metrics import SCORES, MetricsWriter
from hovle_jax.report.page import FILE_NAME, Sample, plain, write_page
from hovle_jax.report.plots import plot_answers, plot_metrics
from hovle_jax.report.progress import format_number
from hovle_jax.report.runs import Run
from hovle_jax.report.tracking import open_tracker

NUM_SAMPLES = 24

# (image uint8 [H, W, 3] or None, question, answer, expected answer)
Record = tuple[np.ndarray | None, str, str, str]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a scorer found.

    Attributes:
      scores: {name: number}, the main one first; an accuracy is in percent.
      exact: {name: how it came about} of those that are shares of right answers.
      records: every question with its answer.
    """

    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    exact: dict[str, ExactMatch] = dataclasses.field(default_factory=dict)
    records: Sequence[Record] = ()

    def mistakes(self) -> int:
        """How many answers are wrong."""
        return sum(plain(got) != plain(expected) for _, _, got, expected in self.records)


def summarize(config: RunConfig, result, track: str = "") -> dict[str, float]:
    """Scores a finished run, and writes RUN/results.json, metrics.png, answers.png, report.html and the chain's page.

    Args:
      result: `loop.Result` of the run.
      track: a service that follows the run (`report.tracking`); '' = none.

    Returns:
      {name: number}, as in results.json.
    """
    folder = result.folder
    scored = score_run(config, folder)
    bad = read_bad_samples(folder)
    reasons = {f"bad samples: {reason}": number for reason, number in count_reasons(bad).items()}
    results = scored.scores | held_out_change(result) | reasons
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    installed = versions()
    (folder / "versions.json").write_text(json.dumps(installed, indent=2) + "\n")
    samples = choose_samples(scored.records)
    if samples:
        plot_answers(samples, folder / "answers.png")
    write_scores(config, folder, result.step, scored.scores, track)
    run = Run.read(folder)
    images = [
        (plot_metrics(run.curves(), folder / "metrics.png", f"{config.stage} ({config.preset})"), "Curves", ""),
        (folder / "first_batch.png", "The first batch", ""),
    ]
    # An accuracy with its interval and its baseline in place of the bare number.
    shown = scored.scores | {name: exact.text() for name, exact in scored.exact.items()}
    shown |= held_out_rows(result) | reasons
    write_page(
        folder,
        f"hovle_jax: {config.stage} ({config.preset})",
        config.to_dict(),
        installed,
        shown,
        samples,
        images,
        bad,
        shares(run.seconds),
        mistakes=scored.mistakes(),
        about=run.about(),
        chain=f"../{FILE_NAME}",
    )
    write_chain(folder.parent)
    return results


def score_run(config: RunConfig, folder: pathlib.Path) -> Scored:
    """The scores of a stage: easy-VQA's benchmark where it was trained on that, else those of held-out rows."""
    if config.stage in SCORERS and config.data.source == "easy_vqa":
        return SCORERS[config.stage](folder, config.eval_limit)
    records = held_out_records(config, folder)
    return score_held_out(records) if records else Scored()


def held_out_records(config: RunConfig, folder: pathlib.Path) -> list[Record]:
    """The questions of data.held_out with the run's answers.

    None yet: asking the model about the rows of a source belongs to `evaluate --data`, and comes from there. What is
    returned here is scored and shown.
    """
    return []


def score_held_out(records: Sequence[Record]) -> Scored:
    """Exact match of answers about held-out rows, with its standard error in percentage points."""
    exact = exact_match(records)
    scores = {
        "accuracy on held-out rows": round(exact.percent, 3),
        "standard error": round(exact.standard_error, 3),
        "questions": exact.count,
    }
    return Scored(scores, {"accuracy on held-out rows": exact}, records)


def exact_match(records: Sequence[Record]) -> ExactMatch:
    """Of records; the case of letters, blanks and a full stop at the end do not count."""
    return ExactMatch.of([plain(got) for _, _, got, _ in records], [plain(expected) for *_, expected in records])


def write_scores(config: RunConfig, folder: pathlib.Path, step: int, scores: dict[str, float], track: str) -> None:
    """Adds scores and answers to the metrics of the last step: JSON line, TensorBoard, the service that follows."""
    values = {f"{SCORES}{name}": value for name, value in scores.items() if isinstance(value, numbers.Real)}
    if not values:
        return
    with MetricsWriter(folder, step, open_tracker(track, folder, config.to_dict())) as writer:
        writer.write(step, values)
        if (folder / "answers.png").is_file():
            writer.show(step, "answers", folder / "answers.png")


def held_out_change(result) -> dict[str, float]:
    """The held-out metrics before the first step and at the end."""
    if not result.held_out:
        return {}
    first, last = min(result.held_out), max(result.held_out)
    changes = {}
    for name, value in result.held_out[last].items():
        if first != last:
            changes[f"held-out {name} at step {first}"] = round(result.held_out[first][name], 4)
        changes[f"held-out {name} at step {last}"] = round(value, 4)
    return changes


def held_out_rows(result) -> dict[str, tuple[float, str]]:
    """The same for the page: {name: (the number at the end, what it was before)}."""
    if not result.held_out:
        return {}
    first, last = min(result.held_out), max(result.held_out)
    before = lambda name: f"{format_number(result.held_out[first][name])} at step {first}" if first != last else ""
    return {f"held-out {name}": (value, before(name)) for name, value in result.held_out[last].items()}


def choose_samples(records: Sequence[Record], count: int = NUM_SAMPLES) -> list[Sample]:
    """Mistakes first, a third of the samples where there are so many, then right answers, both from all over."""
    samples = [Sample(*record) for record in records]
    wrong = [sample for sample in samples if sample.right is False]
    rest = [sample for sample in samples if sample.right is not False]
    wrong = _spread(wrong, max(count // 3, count - len(rest)))
    return wrong + _spread(rest, count - len(wrong))


def _spread(items: Sequence, most: int) -> list:
    """At most so many of them, at even distances."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)]


# ---------------------------------------------------------------------------------------------------------------------
# easy-VQA

# Of a record: what is compared, (answer, expected), or None where it does not count in this score.
Part = Callable[[str, str], tuple[str, str] | None]

QUESTION_PARTS: dict[str, Part] = {"accuracy": lambda got, expected: (got, expected)} | {
    f"accuracy {kind}": lambda got, expected, kind=kind: (got, expected) if answer_kind(expected) == kind else None
    for kind in ("colour", "shape", "yes/no")
}
# 'a blue triangle'
CAPTION_PARTS: dict[str, Part] = {
    "accuracy": lambda got, expected: (got, expected),
    "accuracy colour": lambda got, expected: (got.split()[1], expected.split()[1]),
    "accuracy shape": lambda got, expected: (got.split()[2], expected.split()[2]),
}


def exact_parts(records: Sequence[Record], parts: dict[str, Part]) -> dict[str, ExactMatch]:
    """{name of a part: its exact match}; a part without records is left out."""
    found = {}
    for name, part in parts.items():
        pairs = [pair for *_, got, expected in records if (pair := part(got, expected)) is not None]
        if pairs:
            found[name] = ExactMatch.of(*zip(*pairs))
    return found


def benchmark_scorer(name: str, parts: dict[str, Part]) -> Callable[[pathlib.Path, int], Scored]:
    """A scorer that runs a benchmark."""

    def score(folder: pathlib.Path, limit: int) -> Scored:
        scores, records = evaluate(folder, name, limit)
        records = [(picture.image, question, got, expected) for picture, question, got, expected in records]
        return Scored(scores, exact_parts(records, parts), records)

    return score


def score_captions(folder: pathlib.Path, limit: int) -> Scored:
    """`align` has learned to describe: captions of test images."""
    pictures = [picture for picture in easy_vqa.load("test") if picture.caption]
    pictures = pictures[: limit or 10 * NUM_SAMPLES]
    loaded = load_run(folder, ("embedding", "llm"))
    prompt = f"{IMAGE_MARK}\n{CAPTION_REQUEST}"
    answers = answer(loaded.answerer, [(prompt, [p.image]) for p in pictures], max_new_tokens=8, batch_size=64)
    records = [(p.image, CAPTION_REQUEST, got, p.caption) for p, got in zip(pictures, answers)]
    exact = exact_match(records)
    scores = {"accuracy of captions": round(exact.percent, 2), "test images": exact.count}
    return Scored(scores, {"accuracy of captions": exact}, records)


SCORERS = {
    "contrast": benchmark_scorer("easy_vqa_zero_shot", CAPTION_PARTS),
    "align": score_captions,
    "instruct": benchmark_scorer("easy_vqa", QUESTION_PARTS),
}
