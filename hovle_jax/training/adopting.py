"""Sizes of towers that a run starts from: they are those of the folder with the weights, and need not be given."""

import dataclasses
import pathlib
from typing import Any

from hovle_jax import checkpoints
from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.model.clip_config import CLIP_PARTS, CLIPConfig
from hovle_jax.model.teacher_config import TEACHER_KINDS, TeacherConfig
from hovle_jax.training.stages import find

# Of a CLIP that is trained further, what is the run's own.
OF_TRAINING = ("patch_dropout", "batch_statistics", "frozen")
# What each of its parts says of the config.
FIELDS = {
    "vision": ("vision", "resize", "interpolation"),
    "text": ("text",),
    "vision_projection": ("vision_projection", "projection_width"),
    "text_projection": ("text_projection", "projection_width"),
    "logit_bias": ("loss",),
}


def with_sizes_of_sources(config: RunConfig) -> RunConfig:
    """The config with the sizes of the towers that `init.teacher` and `init.clip` name, where these are folders.

    Raises:
      UserError: a folder without a tower, or parts that a CLIP does not have.
    """
    components = find(config.stage).components
    if unknown := [part for part in config.init.parts_of_clip if part not in CLIP_PARTS]:
        raise UserError(f"init.clip_parts names {', '.join(unknown)}: use some of {','.join(CLIP_PARTS)}")
    if "clip" in components and (model := _model_at(config.init.clip)) and model.clip is not None:
        config = dataclasses.replace(config, clip=_clip(config, model.clip))
    if "teacher" in components and (model := _model_at(config.init.teacher)):
        config = dataclasses.replace(config, teacher=_teacher(config, model))
    return config


def _model_at(source: str) -> ModelConfig | None:
    """The config of a finished model; None for a stage's name, what has to be fetched first, and what is not there."""
    return checkpoints.load_model_config(source) if source and checkpoints.is_finished(pathlib.Path(source)) else None


def _clip(config, stored: CLIPConfig):
    own, parts = config.clip, config.init.parts_of_clip
    if own is None or not parts:
        changes = {name: getattr(own, name) for name in OF_TRAINING} if own else {}
        return dataclasses.replace(stored, **changes)
    taken: dict[str, Any] = {name: getattr(stored, name) for part in parts for name in FIELDS.get(part, ())}
    return dataclasses.replace(own, **taken)


def _teacher(config, model):
    """The tower that the folder has: of the kind that the config names, if it has both."""
    kinds = dict.fromkeys((config.teacher.kind, *TEACHER_KINDS) if config.teacher else TEACHER_KINDS)
    kind = next((kind for kind in kinds if getattr(model, TEACHER_KINDS[kind].component) is not None), None)
    if kind is None:
        raise UserError(f"{config.init.teacher} holds no tower that could teach: give a CLIP, a SigLIP or an InternViT")
    layer = config.teacher.layer if config.teacher else 0
    if TEACHER_KINDS[kind].component != "teacher":
        return TeacherConfig(kind, model.clip.vision, "linear", layer=layer)
    projector = config.teacher.projector if config.teacher and config.teacher.kind == kind else ""
    width = config.model.llm.stack.width
    reads_it = model.teacher.projector == "mlp1" and model.teacher.projector_width == width
    if projector == "mlp1" and not reads_it:
        raise UserError(
            f"{config.init.teacher} has no projector to the student's width {width}; set --config.teacher.projector="
            "linear for a head on the student instead"
        )
    if projector == "linear" or not reads_it:
        return dataclasses.replace(model.teacher, layer=layer, projector="linear", projector_width=0)
    return dataclasses.replace(model.teacher, layer=layer)
