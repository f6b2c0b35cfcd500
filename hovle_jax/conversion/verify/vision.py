"""InternViT alone, and InternVL2: tower, projector, and the LLM that reads its features."""

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.conversion.verify.llm import EXECUTION, embed, text_inputs, with_loss
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.errors import UserError
from hovle_jax.formats.families import Checkpoint
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from hovle_jax.model.teacher import MLP1
from hovle_jax.model.vision import pixel_shuffle
from hovle_jax.model.vit import VisionTransformer


def verify_tower(checkpoint: Checkpoint, reference: Reference) -> None:
    """Compares the last hidden state of an InternViT."""
    tiles = reference.tiles(checkpoint.config.patch_size)
    tower, params = VisionTransformer(checkpoint.config, EXECUTION), checkpoint.load()["teacher"]["vision"]
    hidden, _ = jax.jit(tower.apply)({"params": params}, tiles)
    for name in ("vit_last_hidden_state", "last_hidden_state"):
        reference.compare(name, hidden)


def verify_internvl(checkpoint: Checkpoint, reference: Reference) -> None:
    """Compares the tower's and the projector's outputs and, with input_ids, logits, loss and gradients."""
    config, params = checkpoint.config, checkpoint.load()
    tower, tiles = VisionTransformer(config.vision, EXECUTION), reference.tiles(config.vision.patch_size)
    projector = MLP1(config.llm.stack.width, Execution())

    def see(params):
        teacher = params["teacher"]
        hidden, _ = tower.apply({"params": teacher["vision"]}, tiles)
        return hidden, projector.apply({"params": teacher["mlp1"]}, pixel_shuffle(hidden[:, 1:]))

    if reference.has("input_ids"):
        hidden, features = _verify_answers(checkpoint, reference, params, see)
    else:
        hidden, features = jax.jit(see)(params)
    reference.compare("vit_last_hidden_state", hidden)
    reference.compare("projected_features", features)


def _verify_answers(checkpoint, reference, params, see):
    """Compares the LLM's outputs for text and images -> see(params), computed in the same pass."""
    config = checkpoint.config
    tokens, positions, segment_ids = text_inputs(reference, config.llm.vocab_size)
    # The tiles' tokens fill the places of all rows in order; a tile whose flag is 0 is the dummy of a text row.
    tiles, shown = len(reference.arrays["pixel_values"]), slice(None)
    if "image_flags" in reference:
        flags = reference.input("image_flags").reshape(-1)
        if len(flags) != tiles:
            raise UserError(f"expected.npz: {len(flags)} image_flags and {tiles} tiles")
        shown = np.flatnonzero(flags)
    places = np.nonzero(tokens == reference.number("img_context_token_id"))
    llm = LanguageModel(config.llm, EXECUTION)

    def forward(params):
        hidden, features = see(params)
        bound = llm.bind({"params": params["llm"]})
        x = embed(bound, tokens, checkpoint.public_config["llm_config"])
        rows = features[shown].reshape(-1, features.shape[-1])
        if len(rows) != len(places[0]):
            raise UserError(f"expected.npz: {len(rows)} visual tokens, {len(places[0])} places for them in input_ids")
        x = x.at[places].set(rows)
        hidden_of_llm, _ = bound.run(x, jnp.asarray(positions), jnp.asarray(segment_ids))
        return bound.logits(hidden_of_llm), (hidden, features)

    logits, seen = with_loss(forward, reference, params, checkpoint.to_public)
    reference.compare("logits", logits, segment_ids > 0)
    return seen
