"""Held-out losses: of samples that are never trained on, every one of them once."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from hovle_jax.components import Params
from hovle_jax.config import RunConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.training.saved_steps import HIGHEST
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find
from hovle_jax.training.step import eval_step


def open_held_out(
    config: RunConfig, tokenizer: Tokenizer, numbers: Sequence[int] | None = None, say: Callable = print
) -> pipeline.HeldOut | None:
    """The held-out rows of a run, or None where it has none.

    Args:
      numbers: of the rows of each batch that this host makes; None = all.
    """
    stage, corpus = find(config.stage), _corpus(config, say)
    if corpus is None:
        return None
    may_fill = not stage.compared  # a loss that compares rows with each other would count the empty ones
    return pipeline.build_held_out(config, stage.batch, tokenizer, corpus, numbers, may_fill)


def check_keep_best(keep_best: str, metrics: Collection[str] | None) -> None:
    """Raises UserError where a run has no metric of the name that its best checkpoint is kept by.

    Args:
      keep_best: of the config; '' = none is kept by a metric.
      metrics: names of the held-out ones; None = there are no held-out rows.
    """
    name = keep_best.removeprefix(HIGHEST)
    if name and metrics is None:
        raise UserError(f"keep_best={keep_best!r}: the run has no held-out rows; name some with data.held_out")
    if name and metrics is not None and name not in metrics:
        raise UserError(f"keep_best={keep_best!r} is no held-out metric of this run, which has {', '.join(metrics)}")


def _corpus(config, say):
    """Samples that are never trained on: those that data.held_out names, or a known corpus' own."""
    if config.data.held_out:
        data = dataclasses.replace(config.data, source=config.data.held_out)
        return loading.load_corpus(dataclasses.replace(config, data=data), "test", say)
    if config.data.source in loading.IN_MEMORY and find(config.stage).has_held_out:
        return loading.load_corpus(config, "test", say)
    return None


def evaluate(held_out: pipeline.HeldOut, params: Params, stage: str, run: Run) -> dict:
    """The stage's metrics over all held-out rows: sums over sums of weights, {name: float}."""
    total: dict[str, np.ndarray] = {}
    for batch in held_out:
        pairs = eval_step(params, run.placement.put_batch(batch), stage=stage, run=run)
        for name, pair in jax.device_get(pairs).items():
            total[name] = total.get(name, 0) + np.asarray(pair, np.float64)
    means = {name: float(value / weight) if weight else 0.0 for name, (value, weight) in total.items()}
    return {"loss": sum(means.values())} | find(stage).metrics(means)
