"""A base HoVLE exported as one Llama: our own Llama and transformers' give its logits, for text and for images."""

import dataclasses
import io
import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from hovle_jax.checkpoints import load_component, load_model_config, save_model
from hovle_jax.components import select, shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.llama_folder import export_as_llama
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.data.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import one_llama
from hovle_jax.formats.mapping import public_shapes
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.model.config import LLMConfig, RopeScaling
from hovle_jax.model.embedding import scatter_rows
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.presets import hovle_model
from hovle_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD
from tests import bpe, micro, shared
from tests.public_models import LLAMA3, YARN, random_params
from tests.test_commands import command

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
    "wide heads, biases": hovle(stack=dict(num_heads=8, num_kv_heads=2, head_dim=12, **BIASES), family="llama"),
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


def documented(number, names=None):
    """The names that a Python block of docs/checkpoints.md defines."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    names = {} if names is None else names
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number], names)
    return names


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


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer, the command, and what is refused.

QUESTION = "what color is the shape?"


def with_tokenizer(kind, folder):
    """A model with a tokenizer and one tile an image -> its config; writes FOLDER/ours and FOLDER/llama."""
    tokenizer = micro.tokenizer() if kind == "sentencepiece" else bpe.tokenizer().with_image_tokens()
    config = hovle(vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, system_message='be "brief"\n.', max_tiles=1)
    made(folder / "ours", config, tokenizer)
    export_as_llama(folder / "ours", folder / "llama", say=quiet)
    return config


KINDS = ["sentencepiece", "tokenizer.json"]


def prefixing(**options):
    """A SentencePiece tokenizer whose model, by the library's defaults, puts a blank before each text."""
    model, lines = io.BytesIO(), [question for example in micro.examples() for question, _ in example.questions]
    options = dict(vocab_size=330, model_type="bpe", byte_fallback=True, normalization_rule_name="identity") | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **options
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("tokenizer", [micro.tokenizer, prefixing])
def test_transformers_has_the_ids_of_a_sentencepiece_model(tokenizer, tmp_path):
    """Of a text alone and of a chat. Whether a blank precedes a text is in the model's file; it is not read there."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer()
    made(tmp_path / "ours", hovle(vocab_size=tokenizer.vocab_size), tokenizer)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    ids = tokenizer.encode(QUESTION)
    assert theirs(QUESTION, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == QUESTION
    chat = [{"role": "user", "content": QUESTION}]
    found = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == encode_conversation(tokenizer, [(QUESTION, None)]).tokens.tolist()


@pytest.mark.parametrize("removes", [True, False])
def test_what_transformers_cannot_do_with_blanks_is_said(removes, tmp_path):
    tokenizer, said = prefixing(remove_extra_whitespaces=removes), []
    assert tokenizer.adds_prefix
    made(tmp_path / "ours", hovle(vocab_size=tokenizer.vocab_size), tokenizer)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=said.append)
    assert any("changes blanks or line breaks" in line for line in said) == removes
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    assert (settings["add_prefix_space"], settings["legacy"]) == (True, True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_states_the_built_in_template(kind, tmp_path):
    pytest.importorskip("jinja2")
    config = with_tokenizer(kind, tmp_path)
    import_checkpoint(tmp_path / "llama", tmp_path / "back", say=quiet)
    before, after = (load_tokenizer(tmp_path / name) for name in ("ours", "back"))
    assert (before.chat_template is None, after.chat_template is None) == (True, False)
    for turns, system in (
        ([(QUESTION, None)], ""),
        ([("a", "b"), (QUESTION, None)], ""),
        ([(QUESTION, None)], "other"),
    ):
        expected = encode_conversation(before, turns, system or config.system_message).tokens.tolist()
        assert encode_conversation(after, turns, system).tokens.tolist() == expected
    vision = json.loads((tmp_path / "llama" / "vision.json").read_text())
    assert vision["image_token_id"] == before.image_id
    assert (vision["tile_size"], vision["tokens_per_tile"]) == (32, 4)
    assert (vision["max_dynamic_patch"], vision["system_message"]) == (1, config.system_message)
    public = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (public["bos_token_id"], public["eos_token_id"]) == (before.bos, before.eos)


@pytest.mark.parametrize("kind", KINDS)
def test_the_documented_answer_is_ours(kind, tmp_path, monkeypatch):
    """From an image file to the answer: the second block of the page, as it stands."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with_tokenizer(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(image).save("photo.png")
    names = documented(1, documented(0))
    model = load_run(tmp_path / "ours")
    sample = model.answerer.processor.sample([(QUESTION, None)], [image])
    assert names["ids"][0].tolist() == sample.tokens.tolist()
    (ours,) = answer(model.answerer, [Prompt.of(QUESTION, image)], max_new_tokens=20)
    assert model.tokenizer.decode(names["answer"][0].tolist()).strip() == ours.strip()


def test_the_command_and_what_it_writes(tmp_path):
    made(tmp_path / "ours", MODELS["plain"])
    result = command("convert", "export", str(tmp_path / "ours"), str(tmp_path / "llama"), "--as", "llama")
    assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (tmp_path / "llama").iterdir())
    of_llama = ["config.json", "model.safetensors", "model.safetensors.index.json"]
    assert files == [*of_llama, "vision.json", "vision.safetensors"]
    index = json.loads((tmp_path / "llama" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert set(index["weight_map"]) == set(load_file(tmp_path / "llama" / "model.safetensors"))


@pytest.mark.parametrize(
    ("action", "part", "message"),
    [
        ("export", "llm", "export has no --as llm: give llama, or leave --as out"),
        ("import", "llama", "import has no --as llama: give hovle or llm or teacher, or leave --as out"),
        ("verify", "llama", "verify has no --as llama: leave it out"),
    ],
)
def test_a_value_of_as_belongs_to_an_action(action, part, message):
    result = command("convert", action, *["a", "b"][: 1 + (action != "verify")], "--as", part)
    assert result.returncode == 2
    assert message in result.stderr


def test_bfloat16(tmp_path):
    made(tmp_path / "ours", MODELS["plain"])
    export_as_llama(tmp_path / "ours", tmp_path / "llama", dtype="bfloat16", say=quiet)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name in ("model", "vision"):
        kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "llama" / f"{name}.safetensors").values()}
        assert kinds == {"bfloat16"}


def test_dynamic_positions_of_one_stack_bound_the_length(tmp_path):
    made(tmp_path / "ours", with_rope(hovle(), None, dataclasses.replace(DYNAMIC, original_length=64)))
    said = []
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=said.append)
    assert said[0] == "left out: dynamic NTK, which only one of the two stacks has; texts of up to 64 tokens"
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_scaling"]) == (64, None)


def of_embedding(**changes):
    config = hovle()
    stack = dataclasses.replace(config.embedding.stack, **changes)
    return dataclasses.replace(config, embedding=dataclasses.replace(config.embedding, stack=stack))


REFUSED = {
    "HoVLE-HD shuffles the visual tokens": hovle("post"),
    "L2-normalised before the LLM reads it; a model that is trained with --config.": hovle(
        embedding=dict(normalize_output=True)
    ),
    "a second table of 9 special tokens": hovle(embedding=dict(num_special_tokens=9, vocab_size=micro.VOCAB - 9)),
    "reads 330 ids and the LLM writes 320": hovle(embedding=dict(vocab_size=330)),
    "num_heads=8, the LLM 4": of_embedding(num_heads=8, head_dim=4),
    "num_kv_heads=4, the LLM 2": of_embedding(num_kv_heads=4),
    "head_dim=6, the LLM 8": of_embedding(head_dim=6),
    "mlp_width=48, the LLM 64": of_embedding(mlp_width=48),
    r"rope_theta=500.0, the LLM 1000000.0": of_embedding(rope_theta=500.0),
    "norm_eps=0.001, the LLM 1e-05": of_embedding(norm_eps=1e-3),
    "qkv_bias=True, the LLM False": of_embedding(qkv_bias=True),
    "norm queries and keys": hovle(stack=dict(qk_norm=True)),
    "in all projections of its attention or in none": hovle(stack=dict(qkv_bias=True)),
    "width=32, num_heads=6": hovle(stack=dict(num_heads=6, num_kv_heads=3)),
    "positions are scaled otherwise": with_rope(hovle(), RopeScaling("linear", 2.0, 512), None),
    "an LLM alone has its own public format": ModelConfig(llm=hovle().llm),
    "holds no LLM": ModelConfig(embedding=hovle().embedding),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_one_llama_is_refused_by_name(message, tmp_path):
    """From the config alone: no parameter is read and nothing is written."""
    config = REFUSED[message]
    (tmp_path / "ours" / "model").mkdir(parents=True)
    for component in ("embedding", "llm"):
        if getattr(config, component):
            (tmp_path / "ours" / "model" / component).mkdir()
    (tmp_path / "ours" / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match=re.escape(message)):
        export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    assert not (tmp_path / "llama").exists()
