"""What a run's parameters begin as: finished models' or fresh ones, and what ties fresh parts to trained ones."""

import pathlib
from collections.abc import Collection

import jax

from hovle_jax import checkpoints
from hovle_jax.components import COMPONENTS, Params, fresh
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.model.config import TEACHER_KINDS, HoVLEConfig
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
        if component not in sources:
            params[component] = fresh(run.models.config, component, config.seed, abstract)
        elif component == "teacher" and TEACHER_KINDS[config.teacher.kind].component != "teacher":
            params[component] = load_tower_as_teacher(sources[component], config, abstract)
        else:
            params[component] = checkpoints.load_component(sources[component], component, abstract)
    if "embedding" in params and "embedding" not in sources:
        copy_text_table(params, config.model)
        if config.init.pass_through:
            zero_residual_outputs(params["embedding"]["stack"])
    return params


def load_tower_as_teacher(folder: pathlib.Path, config: RunConfig, abstract: Params) -> Params:
    """The image tower of another component, without the last layers that a teacher of its kind does not run."""
    teacher, vision = config.teacher, abstract["vision"]
    mesh = jax.tree.leaves(vision)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((teacher.vision.num_layers, *leaf.shape[1:]), leaf.dtype, sharding=whole),
        vision["layers"],
    )
    component = TEACHER_KINDS[teacher.kind].component
    tower = checkpoints.load_component(folder, component, {"vision": vision | {"layers": stored}})["vision"]
    layers = jax.tree.map(
        lambda leaf, target: jax.device_put(leaf[: teacher.num_layers], target.sharding),
        tower["layers"],
        vision["layers"],
    )
    return {"vision": tower | {"layers": layers}}


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
