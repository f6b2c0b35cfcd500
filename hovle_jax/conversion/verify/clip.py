"""CLIP and SigLIP: both towers stage by stage, the common space, the logits, the loss and its gradients."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Params
from hovle_jax.conversion.verify.llm import EXECUTION
from hovle_jax.conversion.verify.reference import GRADIENT, Reference
from hovle_jax.errors import UserError
from hovle_jax.formats.families import Checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.clip import CLIP, TextTower, image_tower, normalize
from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig
from hovle_jax.model.vit import VisionTransformer

STAGE = re.compile(r"layer([1-4])")  # of a ResNet
HIDDEN = re.compile(r"(vision|text)_hidden_(\d+)")  # after so many layers


def pair_loss(logits: jax.Array, sigmoid: bool) -> jax.Array:
    """The loss of logits [N, N] whose diagonal holds the pairs.

    Args:
      sigmoid: SigLIP's, -sum_j log sigmoid(z_ij logits_ij), its mean over rows; else the mean of both cross-entropies.
    """
    if sigmoid:
        signs = 2 * jnp.eye(len(logits)) - 1
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=1))
    both = jnp.stack([jax.nn.log_softmax(logits, axis=axis) for axis in (0, 1)])
    return -jnp.mean(jnp.diagonal(both, axis1=1, axis2=2))


def verify_clip(checkpoint: Checkpoint, reference: Reference) -> None:
    """Compares all that expected.npz has of a CLIP: of images, of texts, and of both."""
    config, params = checkpoint.config, checkpoint.load()
    inputs: dict[str, Any] = {}
    if reference.has("pixel_values"):
        inputs["tiles"] = _tiles(reference, config)
    if reference.has("input_ids"):
        inputs["tokens"] = reference.ids("input_ids", config.text.vocab_size)
        if inputs["tokens"].shape[1] > config.text.context:
            length = inputs["tokens"].shape[1]
            raise UserError(f"expected.npz: input_ids have {length} tokens; the context is {config.text.context}")
        if "attention_mask" in reference:
            inputs["mask"] = reference.mask("attention_mask", inputs["tokens"])
    for name in ("logit_scale", "logit_bias")[: 1 + config.has_bias]:
        ours = np.asarray(params["log_scale" if name == "logit_scale" else name])
        reference.compare(name, ours if config.scalar_scale else ours.reshape(1))
    outputs = _outputs(config, params, inputs, reference, checkpoint)
    for name, ours in outputs.items():
        reference.compare(name, ours)
    _compare_layers(config, params, inputs, reference)


def _tiles(reference, config):
    tiles = reference.tiles(1)  # a ViT leaves pixels out that make no patch
    if tiles.shape[1] != config.vision.image_size and isinstance(config.vision, ResNetConfig):
        raise UserError(
            f"expected.npz: pixel_values have {tiles.shape[1]} pixels a side; the ResNet has positions for "
            f"{config.vision.image_size}"
        )
    return tiles


def _outputs(config, params, inputs, reference, checkpoint):
    """{name: ours}; with images and texts loss and gradients are compared, too."""
    if "tokens" not in inputs or "tiles" not in inputs:
        return jax.jit(lambda params: _encoded(config, params, inputs))(params)
    if len(inputs["tokens"]) != len(inputs["tiles"]):
        count = len(inputs["tiles"]), len(inputs["tokens"])
        raise UserError(f"expected.npz: {count[0]} pixel_values and {count[1]} rows of input_ids make no pairs")

    def loss(params):
        made = _encoded(config, params, inputs)
        return made["loss"], made

    if not any(name.startswith(GRADIENT) for name in reference.arrays):
        return jax.jit(loss)(params)[1]
    (_, made), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    reference.compare_gradients(to_public(checkpoint.rules, gradients))
    return made


def _encoded(config: CLIPConfig, params: Params, inputs: dict[str, Any]) -> dict[str, jax.Array]:
    """All outputs by the names that they have in expected.npz."""
    model, made = CLIP(config, EXECUTION).bind({"params": params}), {}
    if "tiles" in inputs:
        hidden, pooled, projected = model.image_states(inputs["tiles"])
        # A SigLIP's and an open_clip's norm is of all tokens; Hugging Face's CLIP gives them before it.
        made |= {"vision_last_hidden_state": hidden, "vision_post_norm": hidden, "image_pooled": pooled}
        made |= {"image_proj": projected, "image_embeds": normalize(projected)}
    if "tokens" in inputs:
        hidden, pooled, projected = model.text_states(inputs["tokens"])
        # SigLIP's public code counts the projection to the pooling.
        made |= {"text_last_hidden_state": hidden, "text_pooled": projected if config.family == "siglip" else pooled}
        made |= {"text_proj": projected, "text_embeds": normalize(projected)}
    if "mask" in inputs:
        made["text_embeds_masked"] = model.encode_texts(inputs["tokens"], inputs["mask"])
    if "tiles" not in inputs or "tokens" not in inputs:
        return made
    for suffix in ("", "_masked")[: 1 + ("mask" in inputs)]:
        logits = model.logits(made["image_embeds"], made[f"text_embeds{suffix}"])
        made |= {f"logits_per_image{suffix}": logits, f"logits_per_text{suffix}": logits.T}
    return made | {"loss": pair_loss(made["logits_per_image"], config.has_bias)}


def _compare_layers(config, params, inputs, reference):
    """Compares states inside the towers: after some of a transformer's layers, or a ResNet's stages."""
    for name in sorted(reference.arrays):
        hidden, stage = HIDDEN.fullmatch(name), STAGE.fullmatch(name)
        if stage and "tiles" in inputs and isinstance(config.vision, ResNetConfig):
            tower = image_tower(config, EXECUTION)
            apply = jax.jit(lambda params, tiles, tower=tower: tower.apply(params, tiles, mutable=["intermediates"]))
            _, sown = apply({"params": params["vision"]}, inputs["tiles"])
            reference.compare(name, sown["intermediates"][f"stage{stage[1]}"][0].transpose(0, 3, 1, 2))
        elif hidden:
            _compare_hidden(config, params, inputs, reference, hidden)


def _compare_hidden(config, params, inputs, reference, match):
    side, count = match[1], int(match[2])
    sizes: Any = config.vision if side == "vision" else config.text
    given = inputs.get("tiles" if side == "vision" else "tokens")
    if given is None or count > sizes.num_layers or isinstance(sizes, ResNetConfig):
        return
    first = {"layers": jax.tree.map(lambda leaf: leaf[:count], params[side]["layers"])} if count else {}
    own = {name: leaf for name, leaf in params[side].items() if name != "layers"} | first
    # Without the norm after the layers.
    tower = (VisionTransformer if side == "vision" else TextTower)(sizes, EXECUTION, count, False)
    reference.compare(match[0], jax.jit(tower.apply)({"params": own}, given)[0])
