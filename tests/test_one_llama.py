"""A base HoVLE exported as one Llama: our own Llama and transformers' give its logits, for text and for images."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from hovle_jax.checkpoints import load_component, load_model_config, save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.llama_folder import export_as_llama
from hovle_jax.model.config import HoVLEConfig, LLMConfig, RopeScaling
from hovle_jax.model.embedding import scatter_rows
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD
from tests import micro, shared
from tests.public_models import LLAMA3, YARN, random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 2e-5
IMAGE_ID = 7


def hovle(variant="pre", layers=(2, 2), stack=None, embedding=None, llm=None, **of_both):
    """A micro HoVLE; `stack` changes both stacks, `of_both` the embedding and the LLM."""
    base = micro.model_config(variant)
    stacks = [dataclasses.replace(base.llm.stack, num_layers=n, **(stack or {})) for n in layers]
    return ModelConfig(
        embedding=dataclasses.replace(base.embedding, stack=stacks[0], **of_both, **(embedding or {})),
        llm=dataclasses.replace(base.llm, stack=stacks[1], **of_both, **(llm or {})),
    )


def with_rope(config, embedding, llm):
    scaled = lambda part, rope: dataclasses.replace(part, stack=dataclasses.replace(part.stack, rope_scaling=rope))
    return dataclasses.replace(config, embedding=scaled(config.embedding, embedding), llm=scaled(config.llm, llm))


DYNAMIC = RopeScaling("dynamic", 2.0, 40)
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
MODELS = {
    "plain": hovle(),
    "unequal numbers of layers, a kv head for each": hovle(layers=(1, 3), stack=dict(num_kv_heads=4)),
    "one kv head, tied": hovle(layers=(3, 1), stack=dict(num_kv_heads=1, rope_theta=500.0), llm=dict(tied=True)),
    "wide heads, biases": hovle(stack=dict(num_heads=6, num_kv_heads=3, head_dim=12, **BIASES), family="llama"),
    "padded": hovle(vocab_multiple=128),
    "padded, tied": hovle(vocab_multiple=128, llm=dict(tied=True)),
    "larger tiles": hovle(embedding=dict(force_image_size=48)),
    "a patch is a token": hovle("none"),
    "llama3": with_rope(hovle(family="llama"), LLAMA3, LLAMA3),
    "yarn": with_rope(hovle(family="llama"), YARN, YARN),
    "dynamic, the LLM alone": with_rope(hovle(), None, dataclasses.replace(DYNAMIC, original_length=512)),
    "dynamic": with_rope(hovle(llm=dict(max_length=40)), DYNAMIC, DYNAMIC),  # and the prompts are longer
}


def made(folder, config, tokenizer=None):
    """A model folder of random weights that give logits of a few units -> {component: parameters}."""
    params = {}
    for component in ("embedding", "llm"):

        def scaled(path, x):
            name = path[-1].key
            return x * 0.1 + 1 if name == "scale" else x / (x.shape[-2] ** 0.5 if name == "kernel" else 5)

        params[component] = jax.tree_util.tree_map_with_path(scaled, random_params(config, component))
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save(folder)
    save_model(folder, config, {component: lambda c=component: params[c] for component in params})
    return params


def prompts(config):
    """-> (ids of a text [L], ids with places for two tiles [L], the tiles [2, S, S, 3] uint8)."""
    rng, c = np.random.default_rng(1), config.embedding
    text = rng.integers(8, config.llm.vocab_size, 50)
    visual = [IMAGE_ID] * c.tokens_per_tile
    tiles = rng.integers(0, 256, (2, c.tile_size, c.tile_size, 3), dtype=np.uint8)
    return text, np.asarray([*text[:9], *visual, *text[9:12], *visual, *text[12:]]), tiles


def batch_of(ids, tiles=None):
    tokens = np.asarray(ids, np.int32)[None]
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    batch["positions"] = np.arange(tokens.shape[1], dtype=np.int32)[None]
    if tiles is None:
        return batch
    places = np.flatnonzero(tokens[0] == IMAGE_ID)[None].astype(np.int32)
    return batch | {"tiles": tiles[None], "image_positions": places}


def logits_of(config, params, ids, tiles=None):
    """[L, V] of the HoVLE itself, without the padding of its vocabulary."""
    model = HoVLE(HoVLEConfig(config.embedding, config.llm))
    return np.asarray(model.logits(params, batch_of(ids, tiles))[0, :, : config.llm.vocab_size])


def imported(folder, into):
    """The exported folder by `convert import` -> (LLMConfig, parameters)."""
    import_checkpoint(folder, into, say=quiet)
    config = load_model_config(into)
    assert config.embedding is None
    return config.llm, load_component(into, "llm", shapes(config, "llm"))


def quiet(_):
    pass


def own_llama(config: LLMConfig, params, x, batch):
    """Logits [L, V] of our own Llama for input vectors [1, L, D], or for its tokens (x is None)."""
    llm = LanguageModel(config, Execution()).bind({"params": params})
    x = llm.token_embedding(batch["tokens"]) if x is None else x
    return np.asarray(llm.logits(llm.run(x, batch["positions"], batch["segment_ids"])[0])[0])


@pytest.mark.parametrize("name", MODELS)
def test_our_own_llama_gives_the_same_logits(name, tmp_path):
    config = MODELS[name]
    params = made(tmp_path / "ours", config)
    text, ids, tiles = prompts(config)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    llama, merged = imported(tmp_path / "llama", tmp_path / "back")
    assert (llama.family, llama.stack.num_layers) == (
        "llama",
        config.embedding.stack.num_layers + config.llm.stack.num_layers,
    )
    expected = logits_of(config, params, text)
    assert 0.5 < np.abs(expected).max() < 20  # so that the tolerance says something
    np.testing.assert_allclose(own_llama(llama, merged, None, batch_of(text)), expected, atol=TOLERANCE)

    batch = batch_of(ids, tiles)
    embedding = HoVLE(HoVLEConfig(config.embedding, config.llm)).embedding.bind({"params": params["embedding"]})
    table = merged["token_embedding"]["embedding"][ids][None]
    x = scatter_rows(table, embedding.embed_tiles(batch["tiles"]), batch["image_positions"])
    np.testing.assert_allclose(
        own_llama(llama, merged, x, batch), logits_of(config, params, ids, tiles), atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["hovle-tiny", "hovle-tiny-stride28"])
def test_reference_logits(name, tmp_path):
    """Of the public PyTorch code, for its prompt with images; in transformers' Llama where it is installed."""
    folder = shared.golden(name)
    expected, context_id = np.load(folder / "expected.npz"), 150
    import_checkpoint(folder, tmp_path / "ours", say=quiet)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    assert json.loads((tmp_path / "llama" / "vision.json").read_text())["image_token_id"] == context_id
    torch = pytest.importorskip("torch")
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1) * np.float32(IMAGENET_STD) + np.float32(IMAGENET_MEAN)
    example, ids = documented(0), expected["input_ids"][0]
    llama, merged = imported(tmp_path / "llama", tmp_path / "back")
    table = torch.nn.Embedding.from_pretrained(torch.from_numpy(merged["token_embedding"]["embedding"]))
    x = example["embed_prompt"](tmp_path / "llama", table, torch.from_numpy(ids), torch.from_numpy(pixels * 255))
    found = own_llama(llama, merged, np.asarray(x)[None], batch_of(ids))
    np.testing.assert_allclose(found, expected["logits"][0], atol=TOLERANCE)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        found = model(inputs_embeds=x[None]).logits[0].numpy()
    np.testing.assert_allclose(found, expected["logits"][0], atol=TOLERANCE)


def documented(number, names=None):
    """The names that a Python block of docs/checkpoints.md defines."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    names = {} if names is None else names
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number], names)
    return names


@pytest.mark.parametrize("name", MODELS)
def test_the_documented_example_embeds_tiles_as_we_do(name, tmp_path):
    torch = pytest.importorskip("torch")
    config = MODELS[name]
    params = made(tmp_path / "ours", config)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    _, _, tiles = prompts(config)
    embedding = HoVLE(HoVLEConfig(config.embedding, config.llm)).embedding.bind({"params": params["embedding"]})
    found = documented(0)["embed_tiles"](tmp_path / "llama", torch.from_numpy(tiles))
    np.testing.assert_allclose(found, embedding.embed_tiles(tiles[None])[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_llama_gives_the_same_logits(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = MODELS[name]
    params = made(tmp_path / "ours", config)
    text, ids, tiles = prompts(config)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", shard_bytes=60_000, say=quiet)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(report.values())
    change_image_id(tmp_path / "llama")
    embed = documented(0)["embed_prompt"]
    x = embed(tmp_path / "llama", model.get_input_embeddings(), torch.from_numpy(ids), torch.from_numpy(tiles))
    with torch.no_grad():
        text_logits = model(torch.from_numpy(text)[None]).logits[0].numpy()
        image_logits = model(inputs_embeds=x[None]).logits[0].numpy()
    np.testing.assert_allclose(text_logits, logits_of(config, params, text), atol=TOLERANCE)
    np.testing.assert_allclose(image_logits, logits_of(config, params, ids, tiles), atol=TOLERANCE)


def change_image_id(folder):
    """These models have no tokenizer, and so no known id of <IMG_CONTEXT>."""
    sizes = json.loads((folder / "vision.json").read_text())
    assert sizes["image_token_id"] is None
    (folder / "vision.json").write_text(json.dumps(sizes | {"image_token_id": IMAGE_ID}))
