"""A checkpoint against reference outputs that lie beside it: every array of `expected.npz` that is known.

The names are the field's own (`logits`, `loss`, `grad.<tensor>`, ...); gradients have the public names and layouts.
"""

import dataclasses
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.formats import llama
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.teacher import MLP1
from hovle_jax.model.transformer import Stack
from hovle_jax.model.vision import pixel_shuffle
from hovle_jax.model.vit import VisionTransformer

TOLERANCE = 2e-5
IGNORED = -100
EXECUTION = Execution()
GRADIENT_ALIASES = {  # older names of two gradients
    "grad_tok_embeddings": "model.tok_embeddings.weight",
    "grad_wqkv0": "model.layers.0.attention.wqkv.weight",
}
GGUF_ALIASES = {"layer0.q_proj": "model.layers.0.self_attn.q_proj.weight"}


class Report:
    """What was compared.

    Attributes:
      errors: {array: largest absolute error}; not a number stays so.
      tokens: {array: whether all tokens are equal}.
      unknown: arrays that nothing is known about, so far.
    """

    def __init__(self, arrays):
        self.arrays = dict(arrays)
        self.errors, self.tokens = {}, {}
        self.unknown = set(self.arrays)

    def __contains__(self, name):
        return name in self.arrays

    def input(self, name):
        """An array that the reference was given. Raises UserError where it is missing."""
        if name not in self.arrays:
            raise UserError(f"expected.npz lacks {name!r}, without which nothing can be compared")
        self.unknown.discard(name)
        return self.arrays[name]

    def has(self, *names):
        """Whether all of these are there; what needs an input that is not stays unknown."""
        return all(name in self.arrays for name in names)

    def ids(self, name, vocab_size):
        """An input [B, L] of token ids, int32. Raises UserError for another shape, or an id that is none."""
        ids = self.input(name)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"expected.npz: {name} of shape {list(ids.shape)} ({ids.dtype}) must be integers [B, L]")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UserError(f"expected.npz: {name} has id {ids.max()}; the checkpoint has {vocab_size} tokens")
        return ids.astype(np.int32)

    def tiles(self, patch_size):
        """The input pixel_values [M, 3, S, S], normalised, as [M, S, S, 3]."""
        pixels = self.input("pixel_values")
        size = pixels.shape[-1]
        if pixels.shape != (len(pixels), 3, size, size) or size % patch_size:
            raise UserError(
                f"expected.npz: pixel_values of shape {list(pixels.shape)} must be [tiles, 3, size, size], with a size "
                f"that {patch_size} (patch_size) divides"
            )
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))

    def compare(self, name, ours, where=True):
        """Notes the largest difference, if the reference has this array; `where` leaves out what is not defined."""
        if name not in self.arrays:
            return
        self.unknown.discard(name)
        reference, ours = self.arrays[name], np.asarray(ours)
        if ours.shape != reference.shape:
            raise UserError(f"{name} has shape {list(reference.shape)} in expected.npz; ours is {list(ours.shape)}")
        difference = np.abs(ours.astype(np.float64) - reference)
        if where is not True:
            difference = difference[np.asarray(where, bool)]
        self.errors[name] = float(np.max(difference, initial=0.0))

    def compare_gradients(self, gradients):
        """Public gradients {name: array} with every `grad.<name>`."""
        for name in self.arrays:
            public = GRADIENT_ALIASES.get(name, name.removeprefix("grad.") if name.startswith("grad.") else None)
            if public in gradients:
                self.compare(name, gradients[public])

    def compare_tokens(self, name, ours):
        self.unknown.discard(name)
        self.tokens[name] = np.array_equal(self.arrays[name], ours)

    def failed(self, tolerance=TOLERANCE):
        """Names of arrays that differ; NaN differs."""
        wrong = [name for name, error in self.errors.items() if not error <= tolerance]
        return wrong + [name for name, equal in self.tokens.items() if not equal]


def verify(folder):
    """Runs the inputs of `folder`/expected.npz through the checkpoint(s) in the folder.

    Returns:
      Report.
    Raises:
      UserError: no expected.npz, no checkpoint, or one that is not supported.
    """
    folder = pathlib.Path(folder)
    path = folder / "expected.npz"
    if not path.is_file():
        raise UserError(f"{path} does not exist; verify compares with reference outputs beside the checkpoint")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            report = Report(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        for file in files:
            _verify_gguf(file, report)
        return report
    checkpoint = open_checkpoint(folder)
    VERIFIERS[checkpoint.kind](checkpoint, report)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Inputs.


def shifted_loss(logits, labels):
    """Mean cross-entropy of logits [B, L, V] against labels [B, L] shifted by one, `IGNORED` left out."""
    targets, scores = labels[:, 1:], jax.nn.log_softmax(logits[:, :-1])
    weights = targets != IGNORED
    chosen = jnp.take_along_axis(scores, jnp.where(weights, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights, chosen, 0)) / jnp.sum(weights)


def _text_inputs(report, vocab_size):
    """-> (tokens, positions, segment_ids), each [B, L] int32; padding is segment 0."""
    tokens = report.ids("input_ids", vocab_size)
    mask = report.input("attention_mask") if "attention_mask" in report else np.ones_like(tokens)
    if mask.shape != tokens.shape:
        raise UserError(f"expected.npz: attention_mask is {list(mask.shape)} and input_ids {list(tokens.shape)}")
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, mask.astype(np.int32)


def _embed(llm, tokens, public_config):
    """Token vectors. The padding id's row learns nothing as input: public code has it as torch's `padding_idx`."""
    x = llm.token_embedding(tokens)
    padding = public_config.get("pad_token_id", 0 if llm.config.family == "internlm2" else None)
    return x if padding is None else jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)


def _with_loss(forward, report, params, rules):
    """Runs forward(params) -> (logits, more); compares loss and gradients where there are labels."""
    if "labels" not in report:
        return jax.jit(forward)(params)
    labels = report.input("labels")
    if labels.shape != report.arrays["input_ids"].shape:
        raise UserError(f"expected.npz: labels is {list(labels.shape)}, input_ids another shape")

    def loss(params):
        logits, more = forward(params)
        return shifted_loss(logits, labels), (logits, more)

    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    report.compare("loss", value)
    report.compare_gradients(to_public(rules, gradients))
    return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Families.


def _verify_llm(checkpoint, report):
    config, params = checkpoint.config, checkpoint.load()
    model = LanguageModel(config, EXECUTION)
    if report.has("input_ids"):
        _verify_text(checkpoint, report, model, params)
    if report.has("greedy_sequence", "greedy_prompt"):
        prompt = report.ids("greedy_prompt", config.vocab_size)
        sequence, logits = greedy_text(model, params, prompt, np.ones_like(prompt), report.arrays["greedy_sequence"])
        report.compare_tokens("greedy_sequence", sequence)
        report.compare("greedy_logits", logits)
    if report.has("batch_greedy_sequences", "batch_prompt", "batch_prompt_mask"):
        prompt, mask = report.ids("batch_prompt", config.vocab_size), report.input("batch_prompt_mask")
        sequences, _ = greedy_text(model, params, prompt, mask, report.arrays["batch_greedy_sequences"])
        report.compare_tokens("batch_greedy_sequences", sequences)


def _verify_text(checkpoint, report, model, params):
    config = checkpoint.config
    tokens, positions, segment_ids = _text_inputs(report, config.vocab_size)
    real = segment_ids > 0

    def forward(params):
        bound = model.bind({"params": params})
        embeddings = _embed(bound, tokens, checkpoint.public_config)
        hidden, _ = bound.run(embeddings, positions, segment_ids)
        return bound.logits(hidden), (embeddings, bound.norm(hidden))

    logits, (embeddings, normed) = _with_loss(forward, report, params, checkpoint.rules)
    report.compare("logits", logits, real)
    report.compare("embeddings", embeddings)
    report.compare("hidden_final_normed", normed, real)
    if "hidden_after_layer1" in report and config.stack.num_layers == 1:
        report.compare("hidden_after_layer1", normed, real)  # transformers' last hidden state is the normed one
    elif "hidden_after_layer1" in report and config.stack.num_layers:
        first = jax.tree.map(lambda leaf: leaf[:1], params["stack"]["layers"])
        stack = Stack(dataclasses.replace(config.stack, num_layers=1), EXECUTION)
        hidden, _ = stack.apply({"params": {"layers": first}}, embeddings, positions, segment_ids)
        report.compare("hidden_after_layer1", hidden, real)


def greedy_text(model, params, prompts, mask, like):
    """Greedy tokens behind LEFT-padded prompts [B, L], each from a full forward over rows that begin at the left.

    Args:
      like: [B, L + steps], the shape of the result.
    Returns:
      (prompts and tokens [B, L + steps], raw logits [B, steps, V]).
    """
    lengths, steps = mask.sum(1), like.shape[1] - prompts.shape[1]
    rows = np.zeros(like.shape, np.int32)
    for row, prompt, length in zip(rows, prompts, lengths, strict=True):
        row[:length] = prompt[len(prompt) - length :]
    index = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    forward, found, every = jax.jit(model.apply), [], np.arange(len(rows))
    for step in range(steps):
        ends = lengths + step
        logits = forward({"params": params}, rows, index, (index < ends[:, None]).astype(np.int32))
        found.append(np.asarray(logits)[every, ends - 1])
        rows[every, ends] = found[-1].argmax(-1)
    new = np.stack([row[length : length + steps] for row, length in zip(rows, lengths, strict=True)])
    return np.concatenate([prompts, new], axis=1), np.stack(found, axis=1)


def _verify_tower(checkpoint, report):
    tiles = report.tiles(checkpoint.config.patch_size)
    tower, params = VisionTransformer(checkpoint.config, EXECUTION), checkpoint.load()["teacher"]["vision"]
    hidden, _ = jax.jit(tower.apply)({"params": params}, tiles)
    for name in ("vit_last_hidden_state", "last_hidden_state"):
        report.compare(name, hidden)


def _verify_internvl(checkpoint, report):
    config, params = checkpoint.config, checkpoint.load()
    tower, llm = VisionTransformer(config.vision, EXECUTION), LanguageModel(config.llm, EXECUTION)
    tiles, width = report.tiles(config.vision.patch_size), config.llm.stack.width

    def see(params):
        teacher = params["teacher"]
        hidden, _ = tower.apply({"params": teacher["vision"]}, tiles)
        return hidden, MLP1(width, "float32").apply({"params": teacher["mlp1"]}, pixel_shuffle(hidden[:, 1:]))

    if not report.has("input_ids"):
        hidden, features = jax.jit(see)(params)
        report.compare("vit_last_hidden_state", hidden)
        report.compare("projected_features", features)
        return
    tokens, positions, segment_ids = _text_inputs(report, config.llm.vocab_size)
    # All tiles' tokens in order fill the places of all rows in order; a tile whose flag is 0 is a text row's dummy.
    shown = np.flatnonzero(report.input("image_flags").reshape(-1)) if "image_flags" in report else slice(None)
    places = np.nonzero(tokens == int(report.input("img_context_token_id")))

    def forward(params):
        hidden, features = see(params)
        bound = llm.bind({"params": params["llm"]})
        x = _embed(bound, tokens, checkpoint.public_config["llm_config"])
        rows = features[shown].reshape(-1, width)
        if len(rows) != len(places[0]):
            raise UserError(f"expected.npz: {len(rows)} visual tokens, {len(places[0])} places for them in input_ids")
        x = x.at[places].set(rows)
        return bound.logits(bound.run(x, positions, segment_ids)[0]), (hidden, features)

    logits, (hidden, features) = _with_loss(forward, report, params, checkpoint.rules)
    report.compare("vit_last_hidden_state", hidden)
    report.compare("projected_features", features)
    report.compare("logits", logits, segment_ids > 0)


class HoVLEInputs:
    """One prompt row with its tiles as the batch contract has it; tokens may be appended within a static length."""

    def __init__(self, config, context_id, report):
        self.config, self.context_id = config.embedding, context_id
        self.tokens = report.ids("input_ids", config.num_tokens)
        is_hd = config.embedding.pixel_shuffle == "post"
        self.long_tokens = report.ids("hd_input_ids", config.num_tokens) if is_hd else None
        self.tiles = report.tiles(config.embedding.patch_size)[None]
        if len(self.tokens) != 1 or ("attention_mask" in report and not report.input("attention_mask").all()):
            raise UserError(f"expected.npz: input_ids {list(self.tokens.shape)}: HoVLE is compared on one row unpadded")
        grid = self.tiles.shape[2] // config.embedding.patch_size
        visual, places = self.tiles.shape[1] * grid**2, np.count_nonzero(self.tokens == context_id)
        visual //= 1 if config.embedding.pixel_shuffle == "none" else 4
        if visual != places:
            raise UserError(f"expected.npz: {visual} visual tokens and {places} places for them in input_ids")

    def batch(self, appended=(), room=0):
        """The batch of the prompt, then `appended`, then padding; `room` tokens are added to the length in all."""
        batch = self.stream(self.tokens, appended, room) | {"tiles": self.tiles}
        if self.long_tokens is None:
            return batch
        long = self.stream(self.long_tokens, appended, room)
        L_long = long["tokens"].shape[1]
        text, long_text = (self.text_places(s) for s in (batch, long))
        long_text_positions = np.full_like(batch["tokens"], L_long)
        long_text_positions[0, text] = long_text
        return batch | {f"long_{key}": x for key, x in long.items()} | {"long_text_positions": long_text_positions}

    def stream(self, prompt, appended, room):
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

    def text_places(self, stream):
        is_text = stream["segment_ids"][0] > 0
        is_text[stream["image_positions"][0]] = False
        return np.flatnonzero(is_text)


def _verify_hovle(checkpoint, report):
    config, params = checkpoint.config, checkpoint.load()
    context_id = checkpoint.public_config["embedding_config"].get("img_context_token_id")
    if context_id is None:
        raise UserError("config.json embedding_config lacks 'img_context_token_id'")
    inputs = HoVLEInputs(config, context_id, report)
    batch, model = inputs.batch(), HoVLE(config, EXECUTION)
    # Patches with their positions, before any shuffle: what the variant without one gives.
    plain = HoVLE(dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, pixel_shuffle="none")))

    def forward(params):
        variables = {"params": params["embedding"]}
        output, _ = model.embedding.apply(variables, batch, method="encode")
        features = model.embedding.apply(variables, output, batch, method="image_outputs")
        patches = plain.embedding.apply(variables, batch["tiles"], method="embed_tiles")
        return model.logits(params, batch), (output, features[0], patches)

    logits, (output, features, patches) = _with_loss(forward, report, params, checkpoint.rules)
    report.compare("logits", logits)
    report.compare("embedding_output", output)
    report.compare("image_features", features)
    M = batch["tiles"].shape[1]
    report.compare("vision_embeddings", patches.reshape(M, -1, patches.shape[-1]))
    if "greedy_tokens" in report:
        steps, tokens, prompt = len(report.arrays["greedy_tokens"]), [], inputs.tokens.shape[1]
        run = jax.jit(model.logits)
        for step in range(steps):  # padded to one length, so compiled once
            tokens.append(int(jnp.argmax(run(params, inputs.batch(tokens, room=steps))[0, prompt + step - 1])))
        report.compare_tokens("greedy_tokens", tokens)


def _verify_gguf(file, report):
    """Arrays that begin with the part of the file's name behind 'model-'."""
    checkpoint, tag = open_checkpoint(file), file.stem.removeprefix("model-") + "."
    config, params = checkpoint.config, checkpoint.load()
    model = LanguageModel(config, EXECUTION)
    tokens, positions, segment_ids = _text_inputs(report, config.vocab_size)
    logits = jax.jit(model.apply)({"params": params}, tokens, positions, segment_ids)
    report.compare(tag + "logits", logits, segment_ids > 0)
    public = to_public(llama.rules(config), params)
    for name in list(report.arrays):
        kind, _, key = name.removeprefix(tag).partition(".")
        if not name.startswith(tag) or kind not in ("gguf", "hf"):
            continue
        if kind == "gguf":
            report.compare(name, checkpoint.source.read(key if key.endswith((".weight", ".bias")) else key + ".weight"))
        else:
            report.compare(name, public[GGUF_ALIASES.get(key, key)])
    if tag + "greedy_sequence" in report:
        # The prompt is what the sequence has in common with the first input row.
        expected = report.arrays[tag + "greedy_sequence"].reshape(1, -1)
        length = min(expected.shape[1], tokens.shape[1])
        prompt = int(np.argmin(np.append(expected[0, :length] == tokens[0, :length], False)))
        ours, _ = greedy_text(model, params, expected[:, :prompt], np.ones((1, prompt), np.int32), expected)
        report.compare_tokens(tag + "greedy_sequence", ours.reshape(report.arrays[tag + "greedy_sequence"].shape))


VERIFIERS = {"llm": _verify_llm, "teacher": _verify_tower, "internvl": _verify_internvl, "hovle": _verify_hovle}
