"""The folder of a HoVLE as one Llama: its tokenizer, what the command writes, and what it refuses."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from hovle_jax.config import ModelConfig
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.llama_folder import export_as_llama
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.data.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.model.config import RopeScaling
from tests import bpe, micro
from tests.one_llama import documented, hovle, made, quiet, with_rope
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
    made(tmp_path / "ours", hovle())
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
        ("export", "llm", "export has no --as llm: give llama or gguf or huggingface or open_clip, or leave --as out"),
        ("import", "llama", "import has no --as llama: give hovle or llm or teacher, or leave --as out"),
        ("verify", "llama", "verify has no --as llama: leave it out"),
    ],
)
def test_a_value_of_as_belongs_to_an_action(action, part, message):
    result = command("convert", action, *["a", "b"][: 1 + (action != "verify")], "--as", part)
    assert result.returncode == 2
    assert message in result.stderr


def test_bfloat16(tmp_path):
    made(tmp_path / "ours", hovle())
    export_as_llama(tmp_path / "ours", tmp_path / "llama", dtype="bfloat16", say=quiet)
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name in ("model", "vision"):
        kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "llama" / f"{name}.safetensors").values()}
        assert kinds == {"bfloat16"}


def test_dynamic_positions_of_one_stack_bound_the_length(tmp_path):
    made(tmp_path / "ours", with_rope(hovle(), None, RopeScaling("dynamic", 2.0, 64)))
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
