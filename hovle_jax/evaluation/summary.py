"""What a finished run shows: its scores, sample answers beside their images, plots, its page and its chain's."""

import numbers
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora.loading import IN_MEMORY
from hovle_jax.data.bad_samples import count_reasons, read_bad_samples
from hovle_jax.evaluation.benchmarks import evaluate, find
from hovle_jax.evaluation.own_data import held_out
from hovle_jax.evaluation.results import Scored
from hovle_jax.inference.load import load_run
from hovle_jax.report.chain import write_chain
from hovle_jax.report.facts import versions
from hovle_jax.report.goodput import shares
from hovle_jax.report.metrics import SCORES, MetricsWriter
from hovle_jax.report.page import FILE_NAME, Sample, write_page
from hovle_jax.report.plots import plot_answers, plot_metrics
from hovle_jax.report.progress import format_number
from hovle_jax.report.runs import Run
from hovle_jax.report.tracking import open_tracker
from hovle_jax.system.files import write_json

NUM_SAMPLES = 24
HELD_OUT_ROWS = 200  # of data.held_out that are asked, unless eval_limit says another number
ANSWERING = ("embedding", "llm")


class Finished(Protocol):
    """What the summary needs of a run's result: its folder, its last step, held-out metrics {step: {name: value}}."""

    folder: pathlib.Path
    step: int
    held_out: dict[int, dict[str, float]]


def summarize(config: RunConfig, result: Finished, benchmark: str | None, track: str = "") -> dict[str, float]:
    """Scores a finished run, and writes RUN/results.json, metrics.png, answers.png, report.html and the chain's page.

    Args:
      result: of the run, as `train` has it.
      benchmark: the stage's own, by name; None = it has none.
      track: a service that follows the run (`report.tracking`); '' = none.

    Returns:
      {name: number}, as in results.json.
    """
    folder = result.folder
    scored = score_run(config, folder, benchmark)
    scores = scores_of(scored)
    bad = read_bad_samples(folder)
    reasons = {f"bad samples: {reason}": number for reason, number in count_reasons(bad).items()}
    results = scores | held_out_change(result) | reasons
    write_json(folder / "results.json", results)
    installed = versions()
    write_json(folder / "versions.json", installed)
    samples = choose_samples(scored.samples if scored else [])
    if samples:
        plot_answers(samples, folder / "answers.png")
    write_scores(config, folder, result.step, scores, track)
    run = Run.read(folder)
    images = [
        (plot_metrics(run.curves(), folder / "metrics.png", f"{config.stage} ({config.preset})"), "Curves", ""),
        (folder / "first_batch.png", "The first batch", ""),
    ]
    # An accuracy with its interval and its baseline in place of the bare number.
    shown = scores | {name: mean.text() for name, mean in (scored.means if scored else {}).items()}
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
        mistakes=scored.mistakes if scored else None,
        about=run.about(),
        chain=f"../{FILE_NAME}",
    )
    write_chain(folder.parent)
    return results


def is_reported(folder: pathlib.Path) -> bool:
    """Whether `summarize` came to the end of a run's own page, before which it may have been killed.

    A model that was imported into a work folder is no run, and has no page.
    """
    if not (folder / "config.json").is_file():
        return True
    return (folder / "results.json").is_file() and (folder / FILE_NAME).is_file()


def complete_chain(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the chain's page where it is older than the page of the run that is reported last."""
    page = workdir / FILE_NAME
    if not (folder / FILE_NAME).is_file():
        return
    if not page.is_file() or page.stat().st_mtime_ns < (folder / FILE_NAME).stat().st_mtime_ns:
        write_chain(workdir)


def score_run(config: RunConfig, folder: pathlib.Path, benchmark: str | None) -> Scored | None:
    """The scores of the stage's benchmark where the run learned from its source, else those of held-out rows.

    None where there is nothing to be asked, or nothing that answers.
    """
    if benchmark and find(benchmark).source == config.data.source:
        return evaluate(folder, benchmark, config.eval_limit or find(benchmark).at_the_end)
    answers = all((folder / "model" / component).is_dir() for component in ANSWERING)
    if not answers or not config.data.held_out or config.data.held_out in IN_MEMORY:
        return None
    limit, outside_root = config.eval_limit or HELD_OUT_ROWS, config.data.outside_root
    scored = held_out(load_run(folder, ANSWERING), config.data.held_out, limit, outside_root=outside_root)
    return scored if scored.answered else None


def scores_of(scored: Scored | None) -> dict[str, float]:
    """{name: number} for results.json; of held-out rows, which may be few, the standard error too."""
    if scored is None:
        return {}
    main = scored.means[scored.benchmark.metric]
    error = {} if scored.benchmark.source else {"standard error": round(main.standard_error, 3)}
    return scored.scores | error


def write_scores(config: RunConfig, folder: pathlib.Path, step: int, scores: dict[str, float], track: str) -> None:
    """Adds scores and answers to the metrics of the last step: JSON line, TensorBoard, the service that follows."""
    values = {f"{SCORES}{name}": float(value) for name, value in scores.items() if isinstance(value, numbers.Real)}
    if not values:
        return
    with MetricsWriter(folder, step, open_tracker(track, folder, config.to_dict())) as writer:
        writer.write(step, values)
        if (folder / "answers.png").is_file():
            writer.show(step, "answers", folder / "answers.png")


def held_out_change(result: Finished) -> dict[str, float]:
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


def held_out_rows(result: Finished) -> dict[str, tuple[float, str]]:
    """The same for the page: {name: (the number at the end, what it was before)}."""
    if not result.held_out:
        return {}
    first, last = min(result.held_out), max(result.held_out)
    before = lambda name: f"{format_number(result.held_out[first][name])} at step {first}" if first != last else ""
    return {f"held-out {name}": (value, before(name)) for name, value in result.held_out[last].items()}


def choose_samples(samples: Sequence[Sample], count: int = NUM_SAMPLES) -> list[Sample]:
    """Mistakes first, a third of the samples where there are so many, then right answers, both from all over."""
    wrong = [sample for sample in samples if sample.right is False]
    rest = [sample for sample in samples if sample.right is not False]
    wrong = _spread(wrong, max(count // 3, count - len(rest)))
    return wrong + _spread(rest, count - len(wrong))


def _spread(items: Sequence, most: int) -> list:
    """At most so many of them, at even distances."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)]
