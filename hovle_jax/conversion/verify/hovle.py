"""HoVLE and HoVLE-HD: the embedding's outputs, logits, loss, gradients and greedy tokens of one prompt with images."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.conversion.verify.llm import EXECUTION, with_loss
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.errors import UserError
from hovle_jax.formats.families import Checkpoint
from hovle_jax.model.config import HoVLEConfig
from hovle_jax.model.hovle import HoVLE


class HoVLEInputs:
    """One prompt row with its tiles, as a model's batch; tokens can be appended within a static length."""

    def __init__(self, config: HoVLEConfig, context_id: int, reference: Reference):
        self.config, self.context_id = config.embedding, context_id
        self.tokens = reference.ids("input_ids", config.num_tokens)
        is_hd = config.embedding.pixel_shuffle == "post"
        self.long_tokens = reference.ids("hd_input_ids", config.num_tokens) if is_hd else None
        self.tiles = reference.tiles(config.embedding.patch_size)[None]
        if len(self.tokens) != 1 or ("attention_mask" in reference and not reference.input("attention_mask").all()):
            raise UserError(
                f"expected.npz: input_ids {list(self.tokens.shape)}: HoVLE is compared on one row without padding"
            )
        grid = self.tiles.shape[2] // config.embedding.patch_size
        visual = self.tiles.shape[1] * grid**2
        is_shuffled = config.embedding.pixel_shuffle != "none"
        self._check_places("input_ids", self.tokens, visual // 4 if is_shuffled else visual)
        if self.long_tokens is not None:
            self._check_places("hd_input_ids", self.long_tokens, visual)
            texts = [stream[stream != context_id].size for stream in (self.tokens, self.long_tokens)]
            if texts[0] != texts[1] or len(self.long_tokens) != 1:
                raise UserError(f"expected.npz: input_ids has {texts[0]} tokens of text and hd_input_ids {texts[1]}")

    def _check_places(self, name, tokens, visual):
        places = np.count_nonzero(tokens == self.context_id)
        if visual != places:
            raise UserError(f"expected.npz: {visual} visual tokens and {places} places for them in {name}")

    def batch(self, appended: Sequence[int] = (), room: int = 0) -> dict[str, np.ndarray]:
        """The batch of the prompt, the `appended` tokens and padding, `room` tokens longer than the prompt."""
        batch = self.stream(self.tokens, appended, room) | {"tiles": self.tiles}
        if self.long_tokens is None:
            return batch
        long = self.stream(self.long_tokens, appended, room)
        L_long = long["tokens"].shape[1]
        text, long_text = (self.text_places(s) for s in (batch, long))
        long_text_positions = np.full_like(batch["tokens"], L_long)
        long_text_positions[0, text] = long_text
        return batch | {f"long_{key}": x for key, x in long.items()} | {"long_text_positions": long_text_positions}

    def stream(self, prompt: np.ndarray, appended: Sequence[int], room: int) -> dict[str, np.ndarray]:
        """One stream's tokens, positions, segment_ids and image_positions, each [1, L]."""
        L, real = prompt.shape[1] + room, prompt.shape[1] + len(appended)
        tokens = np.zeros((1, L), np.int32)
        tokens[0, :real] = [*prompt[0], *appended]
        index = np.arange(L, dtype=np.int32)[None]
        return {
            "tokens": tokens,
            "positions": index,
            "segment_ids": (index < real).astype(np.int32),
            "image_positions": np.flatnonzero(prompt[0] == self.context_id)[None].astype(np.int32),
        }

    def text_places(self, stream: dict[str, np.ndarray]) -> np.ndarray:
        """Indices of the tokens that are neither an image's nor padding."""
        is_text = stream["segment_ids"][0] > 0
        is_text[stream["image_positions"][0]] = False
        return np.flatnonzero(is_text)


def verify_hovle(checkpoint: Checkpoint, reference: Reference) -> None:
    """Compares all that expected.npz has of a HoVLE."""
    config, params = checkpoint.config, checkpoint.load()
    context_id = checkpoint.public_config["embedding_config"].get("img_context_token_id")
    if not isinstance(context_id, int):
        raise UserError(f"config.json embedding_config: img_context_token_id={context_id!r} must be a token's id")
    inputs = HoVLEInputs(config, context_id, reference)
    batch, model = inputs.batch(), HoVLE(config, EXECUTION)
    # Patches with their positions before any pixel shuffle: the output of the variant without one.
    plain = HoVLE(dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, pixel_shuffle="none")))

    def forward(params):
        variables = {"params": params["embedding"]}
        output, _ = model.embedding.apply(variables, batch, method="encode")
        features = model.embedding.apply(variables, output, batch, method="image_outputs")
        patches = plain.embedding.apply(variables, batch["tiles"], method="embed_tiles")
        return model.logits(params, batch), (output, features[0], patches)

    logits, (output, features, patches) = with_loss(forward, reference, params, checkpoint.to_public)
    reference.compare("logits", logits)
    reference.compare("embedding_output", output)
    reference.compare("image_features", features)
    M = batch["tiles"].shape[1]
    reference.compare("vision_embeddings", patches.reshape(M, -1, patches.shape[-1]))
    if "greedy_tokens" in reference:
        steps = len(reference.input("greedy_tokens", (None,), np.integer))
        reference.compare_tokens("greedy_tokens", _greedy(model, params, inputs, steps))


def _greedy(model, params, inputs, steps):
    """The most likely tokens after the prompt, each from a full forward pass of one length, so compiled once."""
    run, tokens, prompt = jax.jit(model.logits), [], inputs.tokens.shape[1]
    for step in range(steps):
        tokens.append(int(jnp.argmax(run(params, inputs.batch(tokens, room=steps))[0, prompt + step - 1])))
    return tokens
