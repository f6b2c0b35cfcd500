"""An InternViT alone, and InternVL2: tower, projector, and the LLM that reads its features."""

import jax
import numpy as np

from hovle_jax.conversion.verify.llm import EXECUTION, embed, text_inputs, with_loss
from hovle_jax.errors import UserError
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from hovle_jax.model.teacher import MLP1
from hovle_jax.model.vision import pixel_shuffle
from hovle_jax.model.vit import VisionTransformer


def verify_tower(checkpoint, report):
    """The last hidden state of an InternViT."""
    tiles = report.tiles(checkpoint.config.patch_size)
    tower, params = VisionTransformer(checkpoint.config, EXECUTION), checkpoint.load()["teacher"]["vision"]
    hidden, _ = jax.jit(tower.apply)({"params": params}, tiles)
    for name in ("vit_last_hidden_state", "last_hidden_state"):
        report.compare(name, hidden)


def verify_internvl(checkpoint, report):
    """The tower's and the projector's outputs; with input_ids logits, loss and gradients too."""
    config, params = checkpoint.config, checkpoint.load()
    tower, tiles = VisionTransformer(config.vision, EXECUTION), report.tiles(config.vision.patch_size)
    projector = MLP1(config.llm.stack.width, Execution())

    def see(params):
        teacher = params["teacher"]
        hidden, _ = tower.apply({"params": teacher["vision"]}, tiles)
        return hidden, projector.apply({"params": teacher["mlp1"]}, pixel_shuffle(hidden[:, 1:]))

    if report.has("input_ids"):
        hidden, features = _verify_answers(checkpoint, report, params, see)
    else:
        hidden, features = jax.jit(see)(params)
    report.compare("vit_last_hidden_state", hidden)
    report.compare("projected_features", features)


def _verify_answers(checkpoint, report, params, see):
    """Compares what the LLM makes of text and images -> see(params), computed beside it."""
    config = checkpoint.config
    tokens, positions, segment_ids = text_inputs(report, config.llm.vocab_size)
    # All tiles' tokens in order fill the places of all rows in order; a tile whose flag is 0 is a text row's dummy.
    tiles, shown = len(report.arrays["pixel_values"]), slice(None)
    if "image_flags" in report:
        flags = report.input("image_flags").reshape(-1)
        if len(flags) != tiles:
            raise UserError(f"expected.npz: {len(flags)} image_flags and {tiles} tiles")
        shown = np.flatnonzero(flags)
    places = np.nonzero(tokens == report.number("img_context_token_id"))
    llm = LanguageModel(config.llm, EXECUTION)

    def forward(params):
        hidden, features = see(params)
        bound = llm.bind({"params": params["llm"]})
        x = embed(bound, tokens, checkpoint.public_config["llm_config"])
        rows = features[shown].reshape(-1, features.shape[-1])
        if len(rows) != len(places[0]):
            raise UserError(f"expected.npz: {len(rows)} visual tokens, {len(places[0])} places for them in input_ids")
        x = x.at[places].set(rows)
        return bound.logits(bound.run(x, positions, segment_ids)[0]), (hidden, features)

    logits, seen = with_loss(forward, report, params, checkpoint.rules)
    report.compare("logits", logits, segment_ids > 0)
    return seen
