"""Folders of runs as training leaves them, without training."""

import json
import pathlib

from hovle_jax import train
from hovle_jax.report.goodput import write_time
from hovle_jax.report.metrics import MetricsWriter

ROOT = pathlib.Path(__file__).parents[1]


def write_run(
    workdir, stage, losses=(3.0, 2.0, 1.0), seed=0, steps=None, results=None, held_out=(), seconds=60.0, **keys
):
    """Writes WORKDIR/STAGE -> its path.

    Args:
      losses: one a step.
      held_out: losses at both ends.
      keys: of optimizer, in place of the config file's.
    """
    folder = workdir / stage
    folder.mkdir(parents=True, exist_ok=True)
    config = train.stage_config(ROOT / "configs", stage, "tiny").to_dict()
    config |= {"seed": seed, "steps": steps or len(losses), "optimizer": config["optimizer"] | keys}
    (folder / "config.json").write_text(json.dumps(config))
    with MetricsWriter(folder) as writer:
        if held_out:
            writer.write(0, {"held_out/loss": held_out[0]})
        for step, loss in enumerate(losses, 1):
            writer.write(step, {"loss": loss, "tokens_seen": 1000 * step, "images_seen": 10 * step})
        if held_out:
            writer.write(len(losses), {"held_out/loss": held_out[1]})
    (folder / "results.json").write_text(json.dumps(results or {}))
    facts = {"parameters_trained": 1_900_000, "parameters_frozen": 0, "samples": 100, "command": "c", "commit": "abc"}
    (folder / "facts.json").write_text(json.dumps(facts))
    write_time(folder, len(losses), {"training": seconds, "data": 0.0})
    return folder


def write_chain(workdir, seed=0, accuracy=90.0, **keys):
    """The five stages of a preset; keys: of the optimizer of `align`."""
    for stage in ("pretrain", "contrast", "distill"):
        write_run(workdir, stage, seed=seed, held_out=(5.0, 0.5) if stage != "contrast" else ())
    write_run(workdir, "align", seed=seed, **keys)
    write_run(workdir, "instruct", seed=seed, results={"accuracy": accuracy, "questions": 10})
    return workdir
