"""Our float32 numbers against the public PyTorch code's: forward, loss, gradients and greedy tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.config import ExecutionConfig
from hovle_jax.errors import UserError
from hovle_jax.formats import hovle, internlm2, internvl
from hovle_jax.formats.mapping import to_ours, to_public
from hovle_jax.formats.safetensors import load_config, load_tensors
from hovle_jax.model.embedding import scatter_rows
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.teacher import MLP1, VisionTeacher
from hovle_jax.model.transformer import Stack
from hovle_jax.model.vision import pixel_shuffle
from hovle_jax.model.vit import VisionTransformer
from tests.golden import Expected, folders, golden

TOLERANCE = 2e-5
IGNORED = -100
EXECUTION = ExecutionConfig()

INTERNLM2_GRADIENTS = {
    "grad_tok_embeddings": "model.tok_embeddings.weight",
    "grad_wqkv0": "model.layers.0.attention.wqkv.weight",
}


def load(name, family):
    """-> (config.json, our config, rules, params, expected); checks that the import is undone exactly."""
    folder = golden(name)
    public_config = load_config(folder)
    config = family.config_from_json(public_config)
    rules, tensors = family.rules(config), load_tensors(folder)
    params = to_ours(rules, tensors)
    back = to_public(rules, params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    return public_config, config, rules, params, Expected(folder)


def shifted_loss(logits, labels):
    """Mean cross-entropy of logits [B, L, V] against labels [B, L] shifted by one, `IGNORED` left out."""
    targets, scores = labels[:, 1:], jax.nn.log_softmax(logits[:, :-1])
    weights = targets != IGNORED
    chosen = jnp.take_along_axis(scores, jnp.where(weights, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights, chosen, 0)) / jnp.sum(weights)


def text_inputs(expected):
    """-> (tokens, positions, segment_ids), each [B, L] int32; padding is segment 0."""
    tokens = expected.input("input_ids").astype(np.int32)
    mask = expected.input("attention_mask") if "attention_mask" in expected else np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, mask.astype(np.int32)


def places(tokens, token_id, count=None):
    """Where `token_id` stands in each row: [B, count] int32, the row's length where there are no more."""
    found = [np.flatnonzero(row == token_id) for row in tokens]
    out = np.full((len(tokens), count or max(map(len, found))), tokens.shape[1], np.int32)
    for row, at in zip(out, found, strict=True):
        row[: len(at)] = at
    return out


def channels_last(pixel_values):
    """[M, 3, S, S] -> [M, S, S, 3]; they are normalised already."""
    return np.ascontiguousarray(pixel_values.transpose(0, 2, 3, 1))


def one_layer(config, execution, layers, *inputs):
    """The first layer alone of a stack's stacked parameters."""
    first = jax.tree.map(lambda leaf: leaf[:1], layers)
    module = Stack(dataclasses.replace(config, num_layers=1), execution)
    return module.apply({"params": {"layers": first}}, *inputs)[0]


@pytest.mark.parametrize("name", folders("internlm2-"))
def test_internlm2(name):
    _, config, rules, params, expected = load(name, internlm2)
    tokens, positions, segment_ids = text_inputs(expected)
    labels = expected.input("labels")
    model = LanguageModel(config, EXECUTION)

    def loss(params):
        logits = model.apply({"params": params}, tokens, positions, segment_ids)
        return shifted_loss(logits, labels), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    embeddings = params["token_embedding"]["embedding"][tokens]
    first = one_layer(config.stack, EXECUTION, params["stack"]["layers"], embeddings, positions, segment_ids)
    real = segment_ids > 0
    expected.compare("logits", logits, real)
    expected.compare("loss", value)
    expected.compare("embeddings", embeddings)
    expected.compare("hidden_after_layer1", first, real)
    expected.compare_gradients(to_public(rules, gradients), INTERNLM2_GRADIENTS)
    expected.finish(TOLERANCE)


@pytest.mark.parametrize("name", folders("internvl2-"))
def test_internvl2(name):
    _, config, rules, params, expected = load(name, internvl)
    tokens, positions, segment_ids = text_inputs(expected)
    labels, tiles = expected.input("labels"), channels_last(expected.input("pixel_values"))
    image_positions = places(tokens, int(expected.input("img_context_token_id")))
    tower, llm = VisionTransformer(config.vision, EXECUTION), LanguageModel(config.llm, EXECUTION)
    width = config.llm.stack.width

    def forward(params):
        teacher, llm_params = params["teacher"], params["llm"]
        hidden, _ = tower.apply({"params": teacher["vision"]}, tiles)
        features = MLP1(width, "float32").apply({"params": teacher["mlp1"]}, pixel_shuffle(hidden[:, 1:]))
        bound = llm.bind({"params": llm_params})
        x = bound.token_embedding(tokens)
        x = scatter_rows(x, features.reshape(len(tokens), -1, width), image_positions)
        logits = bound.logits(bound.run(x, positions, segment_ids)[0])
        return shifted_loss(logits, labels), (hidden, features, logits)

    (value, (hidden, features, logits)), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
    expected.compare("vit_last_hidden_state", hidden)
    expected.compare("projected_features", features)
    expected.compare("logits", logits, segment_ids > 0)
    expected.compare("loss", value)
    expected.compare_gradients(to_public(rules, gradients))
    expected.finish(TOLERANCE)
    if tiles.shape[1] == config.vision.image_size:  # the teacher of distillation is these same parts
        teacher = VisionTeacher(config.teacher, width, EXECUTION)
        target = teacher.apply({"params": params["teacher"]}, tiles, features.shape[1])
        np.testing.assert_allclose(target, features, atol=TOLERANCE)


class HoVLEInputs:
    """One prompt row with its tiles as the batch contract has it; tokens may be appended within a static length."""

    def __init__(self, config, context_id, expected):
        self.config, self.context_id = config.embedding, context_id
        self.tokens = expected.input("input_ids")
        self.long_tokens = expected.input("hd_input_ids") if "hd_input_ids" in expected else None
        self.tiles = channels_last(expected.input("pixel_values"))[None]

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
        image = places(prompt, self.context_id)
        return {
            "tokens": tokens,
            "positions": index,
            "segment_ids": (index < real).astype(np.int32),
            "image_positions": image,
        }

    def text_places(self, stream):
        is_text = stream["segment_ids"][0] > 0
        is_text[stream["image_positions"][0]] = False
        return np.flatnonzero(is_text)


def greedy(logits, params, inputs, steps):
    """Tokens by argmax, each from a full forward; padded to one length, so compiled once."""
    tokens, prompt = [], inputs.tokens.shape[1]
    for step in range(steps):
        tokens.append(int(jnp.argmax(logits(params, inputs.batch(tokens, room=steps))[0, prompt + step - 1])))
    return tokens


@pytest.mark.parametrize("name", folders("hovle-"))
def test_hovle(name):
    public_config, config, rules, params, expected = load(name, hovle)
    inputs = HoVLEInputs(config, public_config["embedding_config"]["img_context_token_id"], expected)
    batch, labels = inputs.batch(), expected.input("labels")
    model = HoVLE(config, EXECUTION)

    def loss(params):
        logits = model.logits(params, batch)
        return shifted_loss(logits, labels), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected.compare("logits", logits)
    expected.compare("loss", value)
    gradients = to_public(rules, gradients)
    expected.compare_gradients(gradients)
    for unused in ("embedding_model.vision_embeddings.class_embedding", "language_model.model.tok_embeddings.weight"):
        assert not np.any(gradients[unused]), unused

    variables = {"params": params["embedding"]}
    output, _ = model.embedding.apply(variables, batch, method="encode")
    features = model.embedding.apply(variables, output, batch, method="image_outputs")
    expected.compare("embedding_output", output)
    expected.compare("image_features", features[0])
    # Patches with their positions, before any shuffle: what the variant without one gives.
    plain = HoVLE(dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, pixel_shuffle="none")))
    patches = plain.embedding.apply(variables, batch["tiles"], method="embed_tiles")
    expected.compare("vision_embeddings", patches.reshape(expected.input("vision_embeddings").shape))

    tokens = expected.input("greedy_tokens")
    assert greedy(jax.jit(model.logits), params, inputs, len(tokens)) == tokens.tolist()
    expected.finish(TOLERANCE)


@pytest.mark.parametrize("name", folders("hovle-")[:1])
def test_a_checkpoint_that_does_not_fit_fails_by_name(name):
    folder = golden(name)
    public_config, tensors = load_config(folder), load_tensors(folder)
    rules = hovle.rules(hovle.config_from_json(public_config))
    missing, wqkv = "language_model.output.weight", "language_model.model.layers.0.attention.wqkv.weight"
    surplus = {k: x for k, x in tensors.items() if k != missing} | {"extra.weight": np.zeros(1, np.float32)}
    with pytest.raises(UserError, match=rf"lacks {missing}; it has unknown extra\.weight"):
        to_ours(rules, surplus)
    with pytest.raises(UserError, match=wqkv):
        to_ours(rules, tensors | {wqkv: tensors[wqkv][:-1]})
    params = to_ours(rules, tensors)
    del params["llm"]["norm"]
    with pytest.raises(UserError, match="llm/norm/scale"):
        to_public(rules, params)
    for key in ("rope_theta", "rms_norm_eps", "use_pixel_shuffle_proj", "llm_vocab_size", "hidden_size"):
        embedding = {k: x for k, x in public_config["embedding_config"].items() if k != key}
        with pytest.raises(UserError, match=key):
            hovle.config_from_json(public_config | {"embedding_config": embedding})
