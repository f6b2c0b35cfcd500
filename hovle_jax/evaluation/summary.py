"""What a finished run shows: its scores, sample answers beside their pictures, plots, one page."""

import json

import numpy as np

from hovle_jax.corpora import easy_vqa
from hovle_jax.data.bad_samples import count_reasons, read_bad_samples
from hovle_jax.data.text.conversation import CAPTION_REQUEST, IMAGE_MARK
from hovle_jax.evaluation.benchmarks import evaluate
from hovle_jax.inference.generate import answer
from hovle_jax.inference.load import load_run
from hovle_jax.report.goodput import read_time, shares
from hovle_jax.report.metrics import TIMES, read_metrics
from hovle_jax.report.page import Sample, versions, write_page
from hovle_jax.report.plots import plot_answers, plot_metrics

NUM_SAMPLES = 24


def summarize(config, result):
    """Scores a finished run, writes RUN/results.json, metrics.png, answers.png and report.html there.

    Returns:
      {name: number}, as in results.json.
    """
    folder = result.folder
    # The benchmarks are easy-VQA's: a run on other data has its losses, and its samples are looked at with `generate`.
    has_benchmark = config.stage in SCORERS and config.data.source == "easy_vqa"
    scores, samples = SCORERS[config.stage](folder, config.eval_limit) if has_benchmark else ({}, [])
    bad = read_bad_samples(folder)
    scores = held_out_change(result) | scores | {f"bad samples: {k}": n for k, n in count_reasons(bad).items()}
    (folder / "results.json").write_text(json.dumps(scores, indent=2) + "\n")
    installed = versions()
    (folder / "versions.json").write_text(json.dumps(installed, indent=2) + "\n")
    rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(folder)]
    plot = plot_metrics(rows, folder / "metrics.png", f"{config.stage} ({config.preset})")
    title = f"hovle_jax: {config.stage} ({config.preset})"
    pictures = [plot, folder / "first_batch.png"]
    if samples:
        plot_answers(samples, folder / "answers.png")
    times = shares(read_time(folder)[1])
    write_page(folder, title, config.to_dict(), installed, scores, samples, pictures, bad, times)
    return scores


def held_out_change(result):
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


def benchmark_samples(name):
    """A scorer that runs a benchmark; wrong answers come first, then an even choice of the rest."""

    def score(folder, limit):
        scores, records = evaluate(folder, name, limit)
        wrong = [r for r in records if r[2] != r[3]][: NUM_SAMPLES // 3]
        right = [r for r in records if r[2] == r[3]]
        some = np.linspace(0, len(right) - 1, min(NUM_SAMPLES - len(wrong), len(right))).astype(int)
        chosen = wrong + [right[i] for i in some]
        return scores, [Sample(picture.image, question, got, expected) for picture, question, got, expected in chosen]

    return score


def captions(folder, limit):
    """`align` has learned to describe: captions of test pictures."""
    pictures = [p for p in easy_vqa.load("test") if p.caption]
    pictures = pictures[: limit or 10 * NUM_SAMPLES]
    loaded = load_run(folder, ("embedding", "llm"))
    prompt = f"{IMAGE_MARK}\n{CAPTION_REQUEST}"
    answers = answer(loaded.answerer, [(prompt, [p.image]) for p in pictures], max_new_tokens=8, batch_size=64)
    right = np.mean([got == p.caption for got, p in zip(answers, pictures)])
    samples = [Sample(p.image, CAPTION_REQUEST, got, p.caption) for p, got in zip(pictures, answers)]
    return {f"captions right of {len(pictures)} test pictures (%)": round(100 * float(right), 2)}, samples[:NUM_SAMPLES]


SCORERS = {
    "contrast": benchmark_samples("easy_vqa_zero_shot"),
    "align": captions,
    "instruct": benchmark_samples("easy_vqa"),
}
