"""CLIP: images and their captions are contrasted over the global batch (Radford et al. 2021)."""

import jax.numpy as jnp

from hovle_jax.components import Models, Params
from hovle_jax.config import RunConfig
from hovle_jax.data.kinds import CAPTIONS
from hovle_jax.model import flops
from hovle_jax.model.clip import MAX_LOG_SCALE
from hovle_jax.model.flops import Work
from hovle_jax.training.flops import TRAINED, Part
from hovle_jax.training.losses import contrastive
from hovle_jax.training.stage import Pairs, Stage


def losses(models: Models, params: dict, batch: dict) -> Pairs:
    """The symmetric contrastive loss."""
    images, texts, log_scale = models["clip"].apply({"params": params["clip"]}, batch["tiles"][:, 0], batch["tokens"])
    return {"loss": contrastive(images, texts, log_scale)}


def clamp_scale(trained: Params) -> Params:
    """The logit scale never exceeds 100."""
    clip = trained["clip"]
    return trained | {"clip": clip | {"log_scale": jnp.minimum(clip["log_scale"], MAX_LOG_SCALE)}}


def parts(config: RunConfig, rows: int) -> list[Part]:
    """Both towers and the similarities of all pairs."""
    c = config.clip
    assert c is not None
    vision = flops.clip_vision_layers(c)
    text = flops.encoder_stack(c.text, c.text.num_layers, c.text.context, causal=c.text.causal)
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
    losses=losses,
    loss_weights={},
    flops=parts,
    benchmark="easy_vqa_zero_shot",
    has_held_out=False,
    after_update=clamp_scale,
)
