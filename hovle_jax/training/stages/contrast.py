"""CLIP and SigLIP: images and their captions are contrasted over the global batch (Radford et al. 2021, Zhai et al.
2023)."""

from typing import cast

import jax
import jax.numpy as jnp

from hovle_jax.components import Models, Params
from hovle_jax.config import RunConfig
from hovle_jax.data.kinds import CAPTIONS
from hovle_jax.model import flops
from hovle_jax.model.clip import MAX_LOG_SCALE
from hovle_jax.model.flops import Work
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.contrastive import contrastive
from hovle_jax.training.flops import TRAINED, Part
from hovle_jax.training.stage import Compared, Pairs, Stage


def encode(models: Models, params: Params, batch: dict) -> tuple[jax.Array, jax.Array]:
    """-> (image vectors, text vectors): [B, E] unit vectors in float32."""
    return models["clip"].apply({"params": params["clip"]}, batch["tiles"][:, 0], batch["tokens"])


def compare(models: Models, params: Params, vectors: tuple[jax.Array, jax.Array]) -> Pairs:
    """The contrastive loss that the model is trained with."""
    clip, config, placement = params["clip"], models.config.clip, cast(Placement, models.placement)
    assert config is not None
    bias = clip["logit_bias"] if config.has_bias else None
    ring = placement.ring(len(vectors[0]))
    return {"loss": contrastive(*vectors, clip["log_scale"], bias, config.loss, ring)}


def clamp_scale(trained: Params) -> Params:
    """The logit scale never exceeds 100."""
    clip = trained["clip"]
    return trained | {"clip": clip | {"log_scale": jnp.minimum(clip["log_scale"], MAX_LOG_SCALE)}}


def parts(config: RunConfig, rows: int) -> list[Part]:
    """Both towers and the similarities of all pairs."""
    c = config.clip
    assert c is not None
    v, t = c.vision, c.text
    vision, text = (
        flops.encoder_stack(v, v.num_layers, v.num_tokens),
        flops.encoder_stack(t, t.num_layers, t.context, causal=True),
    )
    return [
        Part("vision layers", vision * rows, TRAINED, layers=True),
        Part("vision ends", flops.clip_vision_ends(c) * rows, TRAINED),
        Part("text layers", text * rows, TRAINED, layers=True),
        Part("text ends", flops.clip_text_ends(c) * rows, TRAINED),
        Part("similarities", Work(dense=flops.product(rows, c.projection_width, rows)), TRAINED),
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
)
