"""What a stage will read before anything is trained: its first batches as images and figures, and their speed."""

import dataclasses
import os
import pathlib
import time

import jax
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import count_reasons
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.report.batch_images import batch_image
from hovle_jax.report.facts import versions
from hovle_jax.report.page import write_page
from hovle_jax.report.plots import plot_bars, plot_histograms
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.system.files import write_json
from hovle_jax.training.checks import check_tokenizer
from hovle_jax.training.setup import build
from hovle_jax.training.stages import find
from hovle_jax.training.state import make_state
from hovle_jax.training.step import train_step_for
from hovle_jax.training.tokenizer import choose_tokenizer
from hovle_jax.training.weights import load_params

PREVIEW_ROWS = 256  # rows that the figures are about, at least


def open_dataset(config: RunConfig, tokenizer_place: str = "") -> tuple[pipeline.Batches, Tokenizer]:
    """-> (Batches, tokenizer), as `loop.run` would have them."""
    corpus = loading.load_corpus(config, config.data.split)
    if tokenizer_place:
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=tokenizer_place))
    tokenizer = choose_tokenizer(config, [], [], corpus)
    check_tokenizer(config, tokenizer)
    return pipeline.build_dataset(config, find(config.stage).batch, tokenizer, corpus), tokenizer


def preview(config: RunConfig, folder: str | os.PathLike, tokenizer_place: str = "") -> dict:
    """Writes images and a page about the first batches into `folder` -> the figures, as a dict."""
    folder = pathlib.Path(folder)
    dataset, tokenizer = open_dataset(config, tokenizer_place)
    folder.mkdir(parents=True, exist_ok=True)
    first = dataset[0]
    images = [batch_image(first, tokenizer.pieces, folder / "batch.png")]
    rows, events = [], list(dataset.summary.bad)
    for batch, found, _ in dataset.iterate():
        rows += [row_figures({name: array[i] for name, array in batch.items()}) for i in range(len(batch["tokens"]))]
        events += found
        if len(rows) >= PREVIEW_ROWS:
            break
    facts: dict = {"samples": dataset.summary.samples}
    if dataset.summary.text:
        facts["plan"] = dataset.summary.text
    columns = {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}
    facts |= {f"mean {name}": round(float(values.mean()), 4) for name, values in columns.items()}
    images.append(plot_histograms(columns, folder / "rows.png", f"{len(rows)} rows"))
    if dataset.summary.sources:
        by_source = {name: tokens for name, _, tokens in dataset.summary.sources}
        images.append(plot_bars(by_source, folder / "sources.png", "tokens an epoch"))
        facts |= {f"tokens of {name}": tokens for name, tokens in by_source.items()}
    facts |= {f"bad samples: {reason}": number for reason, number in count_reasons(events).items()}
    write_json(folder / "preview.json", facts)
    title = f"hovle_jax: what {config.stage} ({config.preset}) reads"
    write_page(folder, title, config.to_dict(), versions(), facts, [], images, events)
    return facts


def row_figures(row: dict) -> dict:
    """What a row of a batch holds -> {name: number, or one for each of its samples}."""
    if "segment_ids" not in row:
        return {"tokens of a caption": np.count_nonzero(np.diff(row["tokens"])) + 1}
    segments = row["segment_ids"]
    samples = int(segments.max())
    tokens = np.bincount(segments, minlength=samples + 1)[1:]
    learned = row.get("loss_weights", row.get("text_weights")) > 0
    if "loss_weights" in row:  # a position's weight is that of the next token, of the same segment
        learned = np.append(False, learned[:-1])
    figures = {
        "token fill of a row": (segments > 0).mean(),
        "samples of a row": samples,
        "tokens of a sample": tokens,
        "supervised share of a sample": np.bincount(segments, learned, samples + 1)[1:] / np.maximum(tokens, 1),
    }
    if "tiles" in row:
        length, tiles = len(segments), len(row["tiles"])
        first = row["image_positions"].reshape(tiles, -1)[:, 0]
        used = first[first < length]
        figures["tile fill of a row"] = len(used) / tiles
        figures["tiles of a sample"] = np.bincount(segments[used], minlength=samples + 1)[1:]
    return figures


def bench(config: RunConfig, steps: int, tokenizer_place: str = "") -> dict:
    """Times the pipeline alone, and then beside the stage's own step with fresh parameters -> figures, as a dict."""
    dataset, tokenizer = open_dataset(config, tokenizer_place)
    batches = dataset.iterate(0, config.workers)
    seconds, (tokens, tiles, images, size) = _time_alone(batches, steps, tokenizer)
    figures = {
        "images per second": round(images / seconds, 1),
        "tiles per second": round(tiles / seconds, 1),
        "tokens per second": round(tokens / seconds),
        "bytes to the device per step": size,
        "seconds per batch, alone": round(seconds / steps, 4),
    }
    wait, total = _time_training(config, dataset, steps)
    return figures | {
        "seconds per step, training": round(total / steps, 4),
        "stall share": round(wait / total, 4),
        "workers": config.workers,
    }


def _time_alone(batches, steps, tokenizer):
    next(batches)  # the first waits for threads or processes to start
    image_start = tokenizer.specials.get("<img>", -1)
    counts = np.zeros(4, np.int64)
    started = time.perf_counter()
    for _ in range(steps):
        batch, _, _ = next(batches)
        if "segment_ids" in batch:
            tokens, images = np.count_nonzero(batch["segment_ids"]), np.count_nonzero(batch["tokens"] == image_start)
            places = batch.get("image_positions", np.zeros((1, 0)))
            tiles = np.count_nonzero(places < batch["tokens"].shape[1])
            tiles = tiles // (places.shape[1] // batch["tiles"].shape[1]) if "tiles" in batch else 0
        else:
            tokens, tiles, images = batch["tokens"].size, len(batch["tiles"]), len(batch["tiles"])
        counts += [tokens, tiles, images, 0]
    counts[3] = sum(array.nbytes for array in batch.values())
    return time.perf_counter() - started, counts.tolist()


def _time_training(config, dataset, steps):
    """-> (seconds waited for batches, seconds in all) of `steps` steps after the first, which compiles."""
    run = build(config, make_mesh(config.mesh))
    train_step = train_step_for(run)
    state = make_state(find(config.stage), run, load_params(config, run, {}))
    batches, waited, started = dataset.iterate(0, config.workers), 0.0, 0.0
    for step in range(steps + 1):
        asked = time.perf_counter()
        batch = run.placement.put_batch(next(batches)[0])
        if step:
            waited += time.perf_counter() - asked
        state, metrics = train_step(state, batch, stage=config.stage, run=run)
        jax.block_until_ready(metrics)
        started = started or time.perf_counter()
    return waited, time.perf_counter() - started
