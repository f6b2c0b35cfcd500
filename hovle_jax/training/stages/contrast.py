"""CLIP and SigLIP: images and their captions are contrasted over the global batch (Radford et al. 2021, Zhai et al.
2023)."""

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp

from hovle_jax.components import Models, Params
from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.data.kinds import CAPTIONS
from hovle_jax.model import flops
from hovle_jax.model.clip import MAX_LOG_SCALE
from hovle_jax.model.flops import Work
from hovle_jax.model.resnet import STATISTICS, with_statistics
from hovle_jax.sharding.layout import Path
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.flops import TRAINED, UNTOUCHED, Part
from hovle_jax.training.losses.contrastive import contrastive
from hovle_jax.training.stage import Compared, Pairs, Stage

OWN_STATISTICS = "own_statistics"  # a field of training's batches where batch norm is of the batch


def encode(models: Models, params: Params, batch: dict) -> tuple[jax.Array, jax.Array]:
    """-> (image vectors, text vectors): [B, E] unit vectors in float32."""
    variables, of_batch = {"params": params["clip"]}, OWN_STATISTICS in batch
    return models["clip"].apply(variables, batch["tiles"][:, 0], batch["tokens"], batch.get("patches"), of_batch)


def draw(models: Models, batch: dict, key: jax.Array) -> dict:
    """The batch with the patches that its images keep, [B, kept] int32: others for each image, as many for all.

    Or marked as one that is normalised by its own statistics.
    """
    config = models.config.clip
    assert config is not None
    if config.batch_statistics:
        return batch | {OWN_STATISTICS: jnp.ones(len(batch["tiles"]), bool)}
    if not config.patch_dropout:
        return batch
    rows, patches = len(batch["tiles"]), config.vision.grid**2
    order = jnp.argsort(jax.random.uniform(key, (rows, patches)), axis=1)[:, : config.kept_patches]
    return batch | {"patches": models.placement.constrain(order.astype(jnp.int32), ("batch", None))}


def gather_statistics(models: Models, params: Params, batches: Iterable[dict]) -> Params:
    """With `batch_statistics` the stored ones are those of these batches, gathered with the trained weights (Wu and
    Johnson 2021, section 3.2): running means would be of weights that are no longer there."""
    config = models.config.clip
    assert config is not None
    if not config.batch_statistics:
        return params
    module: Any = models["clip"]

    @jax.jit
    def gathered(clip, tiles):
        options: dict[str, Any] = dict(of_batch=True, method="encode_images", mutable=[STATISTICS])
        return module.apply({"params": clip}, tiles, **options)[1][STATISTICS]

    found = [gathered(params["clip"], batch["tiles"][:, 0]) for batch in batches]
    return params | {"clip": with_statistics(params["clip"], found)}


def frozen_parts(config: ModelConfig) -> tuple[Path, ...]:
    """The parts of the towers that the config leaves as they are."""
    assert config.clip is not None
    return tuple(("clip", name) for name in config.clip.frozen_parts)


def compare(models: Models, params: Params, vectors: tuple[jax.Array, jax.Array]) -> Pairs:
    """The contrastive loss that the model is trained with."""
    clip, config, placement = params["clip"], models.config.clip, cast(Placement, models.placement)
    assert config is not None
    bias = clip["logit_bias"] if config.has_bias else None
    ring = placement.ring(len(vectors[0]))
    return {"loss": contrastive(*vectors, clip["log_scale"], bias, config.loss, ring)}


def clamp_scale(trained: Params) -> Params:
    """The logit scale never exceeds 100."""
    clip = trained.get("clip", {})
    if "log_scale" not in clip:  # frozen
        return trained
    return trained | {"clip": clip | {"log_scale": jnp.minimum(clip["log_scale"], MAX_LOG_SCALE)}}


def parts(config: RunConfig, rows: int) -> list[Part]:
    """Both towers and the similarities of all pairs."""
    c = config.clip
    assert c is not None
    vision = flops.clip_vision_layers(c)
    text = flops.clip_text_layers(c)
    frozen = frozen_parts(config.model_config)
    treated = lambda name: UNTOUCHED if ("clip", name) in frozen else TRAINED
    forwards = 1 if config.execution.accumulate == 1 else 2  # vectors first, then their gradients' way back
    return [
        Part("vision layers", vision * rows, treated("vision"), layers=True, forwards=forwards),
        Part("vision ends", flops.clip_vision_ends(c) * rows, treated("vision"), forwards=forwards),
        Part("text layers", text * rows, treated("text"), layers=True, forwards=forwards),
        Part("text ends", flops.clip_text_ends(c) * rows, treated("text"), forwards=forwards),
        Part("similarities", Work(dense=flops.product(rows, c.projection_width, rows)), TRAINED, forwards=2),
    ]


STAGE = Stage(
    components=("clip",),
    trained=(("clip",),),
    batch=CAPTIONS,
    losses=Compared(encode, compare),
    loss_weights={},
    flops=parts,
    benchmark="easy_vqa_zero_shot",
    has_held_out=False,
    after_update=clamp_scale,
    draw=draw,
    finish=gather_statistics,
    frozen=frozen_parts,
)
