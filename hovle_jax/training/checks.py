"""What is wrong with a run, said before it costs time: its config, its mesh, its tokenizer, its hosts' data."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hovle_jax import checkpoints
from hovle_jax.config import ExecutionConfig, RunConfig
from hovle_jax.data.batch import WEIGHTINGS, CorpusSummary
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.model.attention import IMPLEMENTATIONS
from hovle_jax.model.clip_config import CLIP_PARTS
from hovle_jax.model.teacher_config import TEACHER_KINDS
from hovle_jax.model.transformer import remat_policy
from hovle_jax.training.check_numbers import check_numbers
from hovle_jax.training.stages import find

# What weights were trained with and no shape shows; the rotary positions may be changed on purpose, for longer texts.
ROTARY = ("rope_theta", "rope_scaling")
UNSEEN_IN_SHAPES = (
    *ROTARY,
    *("norm", "norm_eps", "activation", "num_heads", "num_kv_heads", "normalize_output", "image_mean", "image_std"),
)


def check(config: RunConfig) -> None:
    """Everything that can be known to be wrong before a device is touched."""
    stage = find(config.stage)
    check_numbers(config)
    config.model.check()
    if config.data.split != "train":
        raise UserError(f"data.split={config.data.split!r}: training reads the 'train' split alone")
    config.easy_vqa.check()
    if config.clip is not None and "clip" in stage.components:
        config.clip.check()
    check_data(config)
    if "teacher" in stage.components:
        config.teacher.check(config.model.llm.stack.width)
    stage.batch.check(config)
    if "clip" in stage.components and config.clip is not None:
        loaded = config.init.parts_of_clip or CLIP_PARTS if config.init.clip else ()
        if fresh := [part for part in config.clip.frozen_parts if part not in loaded]:
            raise UserError(
                f"clip.frozen={config.clip.frozen!r} stays as it is loaded, and {', '.join(fresh)} would not be: set "
                "init.clip to a trained model, and name the part in init.clip_parts if that is set"
            )
    check_execution(config.execution)


def check_data(config: RunConfig) -> None:
    """Raises UserError for values of the data config that mean nothing."""
    data = config.data
    if data.loss_weights not in WEIGHTINGS:
        raise UserError(f"data.loss_weights={data.loss_weights!r} is not one of {', '.join(WEIGHTINGS)}")
    if not 1 <= data.min_tiles <= data.max_tiles:
        raise UserError(
            f"data.min_tiles={data.min_tiles} and data.max_tiles={data.max_tiles}: a grid has from 1 to max_tiles tiles"
        )
    if config.workers < 0:
        raise UserError(f"workers={config.workers} is a number of processes; 0 uses threads")
    if not config.worker_timeout >= 0:
        raise UserError(f"worker_timeout={config.worker_timeout} is a number of seconds; 0 waits for ever")
    if config.data.max_pixels < 1:
        raise UserError(f"data.max_pixels={config.data.max_pixels} is the most of an image; the default is 67108864")
    if not 0 <= config.bad_ceiling <= 1:
        raise UserError(f"bad_ceiling={config.bad_ceiling} is a share of samples; set it between 0 and 1")


def check_execution(execution: ExecutionConfig) -> None:
    choices = {"dtype": ("auto", "float32", "bfloat16"), "attention": IMPLEMENTATIONS}
    for name, allowed in choices.items():
        if getattr(execution, name) not in allowed:
            raise UserError(f"execution.{name}={getattr(execution, name)!r} is not one of {', '.join(allowed)}")
    remat_policy(execution.remat)
    if execution.int8 and importlib.util.find_spec("qwix") is None:
        raise UserError("execution.int8 multiplies by qwix, which is not installed: pip install 'hovle_jax[quantize]'")
    if not 0 <= execution.zero <= 3:
        raise UserError(f"execution.zero={execution.zero} is a level of ZeRO: set it from 0 to 3")
    if execution.vocab_chunk < 0:
        raise UserError(f"execution.vocab_chunk={execution.vocab_chunk} is a number of columns; 0 takes all at once")


def check_sources(config: RunConfig, sources: Mapping[str, Path]) -> list[str]:
    """Whether the run computes with each source's weights as its own model does (`UNSEEN_IN_SHAPES`).

    Args:
      sources: {component: folder of a finished model}; a folder without one is left to `checkpoints.load_component`.
    Returns:
      A line for each source whose rotary positions the run changes.
    Raises:
      UserError: any other difference, with the flags that would take the source's values.
    """
    lines = []
    for component, folder in sources.items():
        if not checkpoints.is_finished(folder):
            continue
        model, wanted = checkpoints.load_model_config(folder), getattr(config.model_config, component)
        path = component if component in ("teacher", "clip") else f"model.{component}"
        stored = getattr(model, component)
        if component == "teacher":  # a tower may be another component's there, and its projector is not taken
            tower = getattr(model, TEACHER_KINDS[wanted.kind].component)
            path, wanted, stored = "teacher.vision", wanted.vision, tower and tower.vision
        values = dict(_unseen(wanted, path))
        if component == "clip" and (parts := config.init.parts_of_clip):  # the others are not taken
            values = {key: value for key, value in values.items() if key.split(".")[1] in parts}
        theirs = {key: value for key, value in _unseen(stored, path) if values.get(key, value) != value}
        changed = {key: value for key, value in theirs.items() if key.endswith(ROTARY)}
        wrong = {key: value for key, value in theirs.items() if key not in changed}
        if wrong:
            found = ", ".join(f"{key}={value!r}, not {values[key]!r}" for key, value in wrong.items())
            flags = " ".join(f"--config.{key}={value}" for key, value in wrong.items())
            raise UserError(f"{folder} was trained with {found}; set {flags}, or take another {component}")
        for key, value in changed.items():
            lines.append(f"{key}={values[key]!r} changes the rotary positions of {folder}, which has {value!r}")
    return lines


def _unseen(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of UNSEEN_IN_SHAPES in a component's config; nothing for None."""
    for field in dataclasses.fields(config) if config is not None else ():
        key, value = f"{path}.{field.name}", getattr(config, field.name)
        if field.name in UNSEEN_IN_SHAPES:
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from _unseen(value, key)


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError where it has ids that the model does not know."""
    components = find(config.stage).components
    known = config.clip.text.vocab_size if "clip" in components else config.model.llm.vocab_size
    remedy = "take the tokenizer of the same model"
    if "embedding" in components:
        known = config.model.num_tokens
        more = tokenizer.vocab_size - config.model.embedding.vocab_size
        remedy = f"set model.embedding.num_special_tokens={more}, or take the tokenizer of the same model"
    if tokenizer.vocab_size > known:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids and the model knows {known}; {remedy}")


def check_same_data_everywhere(summary: CorpusSummary, tokenizer: Tokenizer) -> None:
    """Raises UserError where a host has planned other rows, or reads text otherwise."""
    pieces = hashlib.sha256(repr(tokenizer.pieces(range(tokenizer.vocab_size))).encode()).hexdigest()[:12]
    seen = f"data {summary.digest or 'in memory'} of {summary.samples:,} samples, tokenizer {pieces}"
    distributed.check_same("what they read", seen, "give all hosts the same files")
