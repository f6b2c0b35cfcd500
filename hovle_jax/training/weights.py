"""What a run's parameters begin as: finished models' or fresh ones, and what ties fresh parts to trained ones."""

import pathlib
from collections.abc import Collection
from typing import Any

import jax
from flax import traverse_util

from hovle_jax import checkpoints
from hovle_jax.components import COMPONENTS, Params, fresh
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.model import adapters
from hovle_jax.model.config import HoVLEConfig
from hovle_jax.model.teacher_config import TEACHER_KINDS
from hovle_jax.sharding.layout import Path
from hovle_jax.system.files import errno_of, reason_of
from hovle_jax.system.mirror import Mirror
from hovle_jax.training.setup import Run
from hovle_jax.training.stage import Stage

Sources = dict[str, pathlib.Path]


def load_params(config: RunConfig, run: Run, sources: Sources, only: Collection[str] | None = None) -> Params:
    """Every parameter of the stage: from the models in `sources` {component: folder}, else fresh.

    Args:
      only: names of components; None = all.
    """
    params = {}
    for component, abstract in run.abstract_params().items():
        if only is not None and component not in only:
            continue
        made = lambda c=component, a=abstract: fresh(run.models.config, c, config.seed, a)
        if component not in sources:
            params[component] = made()
        elif component == "teacher":
            params[component] = load_teacher(sources[component], config, abstract)
        elif component == "clip" and config.init.clip_parts:
            parts = config.init.clip_parts.split(",")
            params[component] = load_parts(sources[component], component, parts, made(), abstract)
        else:
            params[component] = checkpoints.load_component(sources[component], component, abstract)
    if "embedding" in params and "embedding" not in sources:
        copy_text_table(params, config.model)
        if config.init.pass_through:
            zero_residual_outputs(params["embedding"]["stack"])
    if adapters.COMPONENT in params:
        params[adapters.COMPONENT] = adapters.begun(params[adapters.COMPONENT], params)
    return params


def load_teacher(folder: pathlib.Path, config: RunConfig, abstract: Params) -> Params:
    """A teacher, or the image tower of another component, without the layers that a teacher does not run."""
    assert config.teacher is not None
    depth, runs = config.teacher.depth, config.teacher.num_layers
    wanted: dict[Path, Any] = traverse_util.flatten_dict(abstract)
    whole = lambda leaf: jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    stored = {
        path: jax.ShapeDtypeStruct((depth, *leaf.shape[1:]), leaf.dtype, sharding=whole(leaf))
        for path, leaf in wanted.items()
        if path[:2] == ("vision", "layers") and depth != runs
    }
    tree = traverse_util.unflatten_dict(wanted | stored)
    read = checkpoints.load_component(folder, TEACHER_KINDS[config.teacher.kind].component, tree)
    flat: dict[Path, Any] = traverse_util.flatten_dict(read)
    cut = {path: jax.device_put(flat[path][:runs], wanted[path].sharding) for path in stored}
    return traverse_util.unflatten_dict(flat | cut)


def load_parts(folder: pathlib.Path, component: str, parts: Collection[str], made: Params, abstract: Params) -> Params:
    """A component of which some parts come from a folder, and the others are as they were made."""
    taken = {name: leaf for name, leaf in abstract.items() if name in parts}
    return made | checkpoints.load_component(folder, component, taken)


def copy_text_table(params: Params, model: HoVLEConfig) -> None:
    """A fresh holistic embedding starts with the LLM's token vectors as its text table, as far as there are any."""
    if "llm" not in params:
        return
    table = params["llm"]["token_embedding"]["embedding"][: model.llm.vocab_size]
    embedding, size = params["embedding"], model.embedding.vocab_size
    for name, rows in (("text_embedding", table[:size]), ("special_embedding", table[size:])):
        if name in embedding:
            made = embedding[name]["embedding"]
            rows = rows[: len(made)]
            # A copy also where all rows are replaced: the step donates its buffers.
            embedding[name] = {"embedding": jax.device_put(made.at[: len(rows)].set(rows), made.sharding)}


def zero_residual_outputs(stack: Params) -> None:
    """Zeros in what ends the residual branches of a fresh stack, which then gives its input; they learn from there."""
    layers = stack["layers"]
    for name in ("output", "down"):
        layers[name] = jax.tree.map(
            lambda leaf: jax.device_put(jax.numpy.zeros_like(leaf), leaf.sharding), layers[name]
        )


def save_result(
    folder: pathlib.Path, stage: Stage, params: Params, config: RunConfig, mirror: Mirror | None = None
) -> None:
    """Writes FOLDER/model: what the stage hands on. Raises UserError where it cannot be written, as on a full disk."""
    if adapters.COMPONENT in params:
        params = adapters.merged(params, params[adapters.COMPONENT], config.adapter)
    components = [c for c in COMPONENTS if c in stage.result and c in params]
    made = {c: lambda c=c: params[c] for c in components}
    try:
        checkpoints.save_model(folder, config.model_config.only(components), made, mirror)
    except (OSError, ValueError) as error:  # the second is tensorstore's
        if errno_of(error) is None:
            raise
        raise UserError(
            f"cannot write {folder}/model: {reason_of(error)}; put that right, and the same command goes on from the "
            "newest checkpoint"
        ) from error
