"""A base HoVLE exported as one Llama: our own Llama and transformers' give its logits, for text and for images."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from hovle_jax.checkpoints import load_component, load_model_config
from hovle_jax.components import select, shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.llama_folder import export_as_llama
from hovle_jax.formats import one_llama
from hovle_jax.formats.mapping import public_shapes
from hovle_jax.model.config import LLMConfig, RopeScaling
from hovle_jax.model.embedding import scatter_rows
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.presets import hovle_model
from hovle_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD
from tests import shared
from tests.one_llama import documented, hovle, made, quiet, with_rope
from tests.public_models import LLAMA3, YARN

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 2e-5
IMAGE_ID = 7


DYNAMIC = RopeScaling("dynamic", 2.0, 40)
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
MODELS = {
    "plain": hovle(),
    "unequal numbers of layers, a kv head for each, padded": hovle(
        layers=(1, 3), stack=dict(num_kv_heads=4), vocab_multiple=128
    ),
    "one kv head, tied, padded": hovle(
        layers=(3, 1), stack=dict(num_kv_heads=1, rope_theta=500.0), llm=dict(tied=True), vocab_multiple=128
    ),
    "wide heads, biases": hovle(stack=dict(num_heads=8, num_kv_heads=2, head_dim=12, **BIASES), family="llama"),
    "a patch is a token, llama3": with_rope(hovle("none", family="llama"), LLAMA3, LLAMA3),
    "larger tiles, yarn": with_rope(hovle(family="llama", embedding=dict(force_image_size=48)), YARN, YARN),
    "dynamic, the LLM alone": with_rope(hovle(), None, dataclasses.replace(DYNAMIC, original_length=512)),
    "dynamic": with_rope(hovle(llm=dict(max_length=40)), DYNAMIC, DYNAMIC),  # and the prompts are longer
}


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


def imported(folder, into):
    """The exported folder by `convert import` -> (LLMConfig, parameters)."""
    import_checkpoint(folder, into, say=quiet)
    config = load_model_config(into)
    assert config.embedding is None
    return config.llm, load_component(into, "llm", shapes(config, "llm"))


def own_llama(config: LLMConfig, params, x, batch):
    """Logits [L, V] of our own Llama for input vectors [1, L, D], or for its tokens (x is None)."""

    @jax.jit
    def run(params, x, batch):
        llm = LanguageModel(config, Execution()).bind({"params": params})
        x = llm.token_embedding(batch["tokens"]) if x is None else x
        return llm.logits(llm.run(x, batch["positions"], batch["segment_ids"])[0])[0]

    return np.asarray(run(params, x, batch))


@dataclasses.dataclass(frozen=True)
class Exported:
    """One of `MODELS`, as a HoVLE and as the folder of a Llama.

    Attributes:
      text, ids: [L]; `ids` has places for two tiles.
      tiles: [2, S, S, 3] uint8.
      text_logits, image_logits: [L, V] of the HoVLE itself, without the padding of its vocabulary.
      embedding: the bound module.
    """

    config: ModelConfig
    folder: pathlib.Path
    text: np.ndarray
    ids: np.ndarray
    tiles: np.ndarray
    text_logits: np.ndarray
    image_logits: np.ndarray
    embedding: Any


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    config, folder = MODELS[request.param], tmp_path_factory.mktemp("exported")
    params = made(folder / "ours", config)
    export_as_llama(folder / "ours", folder / "llama", shard_bytes=60_000, say=quiet)
    text, ids, tiles = prompts(config)
    model = HoVLE(config.model)
    run = jax.jit(lambda batch: model.logits(params, batch)[0, :, : config.llm.vocab_size])
    logits = [np.asarray(run(batch)) for batch in (batch_of(text), batch_of(ids, tiles))]
    assert all(0.5 < np.abs(x).max() < 20 for x in logits)  # so that the tolerance says something
    embedding = model.embedding.bind({"params": params["embedding"]})
    return Exported(config, folder / "llama", text, ids, tiles, *logits, embedding)


def test_our_own_llama_gives_the_same_logits(exported, tmp_path):
    llama, merged = imported(exported.folder, tmp_path / "back")
    assert llama.family == "llama"
    assert llama.stack.num_layers == exported.config.embedding.stack.num_layers + exported.config.llm.stack.num_layers
    found = own_llama(llama, merged, None, batch_of(exported.text))
    np.testing.assert_allclose(found, exported.text_logits, atol=TOLERANCE)
    batch = batch_of(exported.ids, exported.tiles)
    table = merged["token_embedding"]["embedding"][exported.ids][None]
    x = scatter_rows(table, exported.embedding.embed_tiles(batch["tiles"]), batch["image_positions"])
    np.testing.assert_allclose(own_llama(llama, merged, x, batch), exported.image_logits, atol=TOLERANCE)


def test_the_documented_example_embeds_tiles_as_we_do(exported):
    torch = pytest.importorskip("torch")
    found = documented(0)["embed_tiles"](exported.folder, torch.from_numpy(exported.tiles))
    np.testing.assert_allclose(found, exported.embedding.embed_tiles(exported.tiles[None])[0], atol=TOLERANCE)


def test_transformers_llama_gives_the_same_logits(exported, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = shutil.copytree(exported.folder, tmp_path / "llama")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(report.values())
    sizes = json.loads((folder / "vision.json").read_text())
    assert sizes["image_token_id"] is None  # without a tokenizer no id is known
    (folder / "vision.json").write_text(json.dumps(sizes | {"image_token_id": IMAGE_ID}))
    text, ids, tiles = map(torch.from_numpy, (exported.text, exported.ids, exported.tiles))
    x = documented(0)["embed_prompt"](folder, model.get_input_embeddings(), ids, tiles)
    with torch.no_grad():
        text_logits = model(text[None]).logits[0].numpy()
        image_logits = model(inputs_embeds=x[None]).logits[0].numpy()
    np.testing.assert_allclose(text_logits, exported.text_logits, atol=TOLERANCE)
    np.testing.assert_allclose(image_logits, exported.image_logits, atol=TOLERANCE)


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


def test_the_published_model_is_a_llama_of_32_layers():
    model = hovle_model()
    config = ModelConfig(embedding=model.embedding, llm=model.llm)
    llama = one_llama.llm_config(model)
    rules = [*one_llama.rules(model), *one_llama.vision_rules(model.embedding)]
    wanted = {tuple(path.split("/")) for r in rules for path in r.ours}
    whole = {component: shapes(config, component) for component in ("embedding", "llm")}
    written = public_shapes(rules, select(whole, lambda path: path in wanted))
    assert (llama.stack.num_layers, llama.max_length, llama.stack.rope_scaling) == (32, 32768, None)
    layers = {int(match[1]) for name in written if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    assert layers == set(range(32))
    # All that is published, without the LLM's own table, the class token and its position.
    assert sum(map(math.prod, written.values())) == 2_606_327_808 - (92553 + 2) * 2048
