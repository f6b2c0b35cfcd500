"""Exports as GGUF: the metadata of tokenizers, the file, and what is refused."""

import dataclasses
import errno
import json
import math
import re
import sys
import weakref

import numpy as np
import pytest

from hovle_jax.checkpoints import save_model
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.gguf_file import export_as_gguf, write_gguf
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.data.text.tokenizer import HuggingFaceTokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf_metadata
from hovle_jax.formats.gguf import PRE_TOKENIZERS, GGUFFile
from hovle_jax.model.config import RopeScaling
from hovle_jax.system.files import whole_file
from tests import bpe, micro
from tests.one_llama import hovle, made, quiet, with_rope
from tests.public_models import LLAMA3, YARN, llm
from tests.test_commands import command
from tests.test_llama_folder import prefixing

pytestmark = pytest.mark.usefixtures("quick_compilation")
pytest.importorskip("gguf")
TEXTS = ["what color is the shape?", "  two  blanks\n\nand é 東 🙂\ttab", "It's 2026: 12345 isn't\n"]


def test_metadata_of_a_sentencepiece_model(tmp_path):
    tokenizer = micro.tokenizer()
    config = hovle(vocab_size=tokenizer.vocab_size + 3)  # the model has ids that the tokenizer lacks
    made(tmp_path / "ours", config, tokenizer)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    metadata = GGUFFile(tmp_path / "model.gguf").metadata
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if "tokenizer" in key}
    tokens, kinds = keys.pop("tokens"), keys.pop("token_type")
    assert (keys["model"], len(tokens), len(kinds), len(keys["scores"])) == ("llama", *[config.llm.vocab_size] * 3)
    specials = tokenizer.specials
    assert {tokens[i] for i, kind in enumerate(kinds) if kind == 3} == set(specials)
    assert tokens[-3:] == [f"[PAD{tokenizer.vocab_size + i}]" for i in range(3)] and kinds[-3:] == [5] * 3
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 4] == ["\n"]  # user-defined: it never merges
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 6] == [f"<0x{i:02X}>" for i in range(256)]
    assert tokens[0] == "<unk>" and kinds[0] == 2
    ids = {key: value for key, value in keys.items() if key.endswith("_id")}
    assert ids == dict(bos_token_id=1, eos_token_id=2, eot_token_id=specials["<|im_end|>"], unknown_token_id=0)
    begins = {key: value for key, value in keys.items() if key.startswith("add_")}
    assert begins == dict(add_bos_token=True, add_eos_token=False, add_space_prefix=tokenizer.adds_prefix)
    assert "<|im_start|>assistant" in metadata["tokenizer.chat_template"]
    assert (metadata["general.architecture"], metadata["general.file_type"]) == ("llama", 0)


def test_a_byte_level_bpe_comes_back(tmp_path):
    tokenizer = bpe.tokenizer()
    tokenizer.chat_template = bpe.CHATML
    config = ModelConfig(llm=dataclasses.replace(llm("qwen2", qkv_bias=True), vocab_size=tokenizer.vocab_size))
    made(tmp_path / "ours", config, tokenizer)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    assert GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.pre"] == "smollm"
    import_checkpoint(tmp_path / "model.gguf", tmp_path / "back", say=quiet)
    back = load_tokenizer(tmp_path / "back")
    for text in [*TEXTS, *bpe.LINES, *bpe.SPECIALS]:
        assert back.encode(text) == tokenizer.encode(text)
    assert (back.specials, back.stop_ids) == (tokenizer.specials, tokenizer.stop_ids)
    assert back.chat_template == bpe.CHATML


def test_every_way_to_split_text_is_told_from_the_others():
    content = json.loads(bpe.trained().to_str())
    found = {}
    for name, parts in PRE_TOKENIZERS.items():
        model = content["model"] | {"ignore_merges": name == "llama-bpe"}
        changed = content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}, "model": model}
        tokenizer = HuggingFaceTokenizer(json.dumps(changed), stops=["<|im_end|>"])
        keys = gguf_metadata.tokenizer_to_metadata(tokenizer, tokenizer.vocab_size, "")
        found[name] = keys["tokenizer.ggml.pre"]
    assert found == {name: name for name in PRE_TOKENIZERS}


def changed_bpe(**changes):
    return HuggingFaceTokenizer(json.dumps(json.loads(bpe.trained().to_str()) | changes), stops=["<|im_end|>"])


UNKNOWN = {
    "kind bpe, and this one is unigram": lambda: prefixing(model_type="unigram", hard_vocab_limit=False),
    "splits text in none of the ways": lambda: changed_bpe(pre_tokenizer={"type": "Whitespace"}),
    "does not normalise text": lambda: changed_bpe(normalizer={"type": "Lowercase"}),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_a_tokenizer_that_llama_cpp_lacks_is_left_out_and_named(message, tmp_path):
    tokenizer, said = UNKNOWN[message](), []
    made(tmp_path / "ours", hovle(vocab_size=tokenizer.vocab_size), tokenizer)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=said.append)
    (line,) = (line for line in said if message in line)
    assert line.startswith("left out: the tokenizer (") and line.endswith("are their ids, and so are prompts")
    assert GGUFFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.tokens"][:2] == ["[0]", "[1]"]


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_the_bytes(dtype, error, tmp_path):
    made(tmp_path / "ours", hovle())
    for name in ("float32", dtype):
        export_as_gguf(tmp_path / "ours", tmp_path / f"{name}.gguf", name, say=quiet)
    wide, narrow = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("float32", dtype))
    assert wide.shapes == narrow.shapes
    for name, shape in wide.shapes.items():
        found, expected = narrow.read(name), wide.read(name)
        if len(shape) == 1:  # norms stay float32
            np.testing.assert_array_equal(found, expected)
        else:
            assert 0 < np.abs(found - expected).max() < error * np.abs(expected).max()
    sizes = [(tmp_path / f"{name}.gguf").stat().st_size for name in ("float32", dtype)]
    matrices = sum(math.prod(shape) for shape in wide.shapes.values() if len(shape) > 1)
    assert abs(sizes[0] - sizes[1] - 2 * matrices) < 64


def test_tensors_are_written_one_at_a_time(tmp_path):
    alive = []

    def tensors():
        for i in range(5):
            assert sum(reference() is not None for reference in alive) <= 1  # the one that was just written
            tensor = np.full((3, 32), i, np.float32)
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    write_gguf(tmp_path / "model.gguf", "llama", {}, {f"t{i}": (3, 32) for i in range(5)}, tensors(), "float32")
    written = GGUFFile(tmp_path / "model.gguf")
    assert [written.read(f"t{i}")[0, 0] for i in range(5)] == [0, 1, 2, 3, 4]


def test_numbers_that_exceed_float16(tmp_path):
    params = made(tmp_path / "ours", config := hovle())
    params["llm"]["head"]["kernel"] = params["llm"]["head"]["kernel"].at[0, :3].set(1e5)
    save_model(tmp_path / "big", config, {c: lambda c=c: params[c] for c in params})
    with pytest.raises(UserError, match=r"3 numbers of output\.weight exceed float16 .*--dtype bfloat16 or float32"):
        export_as_gguf(tmp_path / "big", tmp_path / "model.gguf", "float16", say=quiet)
    assert not list(tmp_path.glob("model*"))


def test_the_command(tmp_path):
    made(tmp_path / "ours", hovle())
    line = ["convert", "export", str(tmp_path / "ours")]
    result = command(*line, str(tmp_path / "model.gguf"), "--as", "gguf", "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    assert "model.gguf: 39 tensors" in result.stdout and "export --as llama writes it" in result.stdout
    assert GGUFFile(tmp_path / "model.gguf").metadata["general.file_type"] == 1
    result = command(*line, str(tmp_path / "llama"), "--as", "llama", "--dtype", "float16")
    assert result.returncode == 2 and "--dtype float16 is for --as gguf" in result.stderr


def test_dynamic_positions_bound_the_length(tmp_path):
    made(tmp_path / "ours", with_rope(hovle(), None, RopeScaling("dynamic", 2.0, 64)))
    said = []
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=said.append)
    assert said[0] == "left out: dynamic NTK, which llama.cpp does not have; texts of up to 64 tokens"
    assert GGUFFile(tmp_path / "model.gguf").metadata["llama.context_length"] == 64


UNTRUNCATED = dataclasses.replace(YARN, truncate=False)
REFUSED = {
    "HoVLE-HD shuffles the visual tokens": hovle("post"),
    "L2-normalised before the LLM reads it": hovle(embedding=dict(normalize_output=True)),
    "a second table of 9 special tokens": hovle(embedding=dict(num_special_tokens=9, vocab_size=micro.VOCAB - 9)),
    "norm queries and keys": hovle(stack=dict(qk_norm=True)),
    "YaRN's bounds to whole pairs": with_rope(hovle(), UNTRUNCATED, UNTRUNCATED),
    "of Llama alone, not of qwen3": ModelConfig(llm=llm("qwen3", qk_norm=True, rope_scaling=LLAMA3)),
    "does not have these biases": ModelConfig(llm=llm("internlm2", qkv_bias=True)),
    "holds no LLM": ModelConfig(embedding=hovle().embedding),
}


def stored(folder, config):
    """The folder of a model as far as its config says it."""
    for component in ("embedding", "llm"):
        if getattr(config, component):
            (folder / "model" / component).mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(message, tmp_path):
    stored(tmp_path / "ours", REFUSED[message])
    with pytest.raises(UserError, match=re.escape(message)):
        export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    assert not (tmp_path / "model.gguf").exists()


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), whole_file(tmp_path / "new" / "file") as path:
        path.write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyError), whole_file(tmp_path / "file") as path:
        path.write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with whole_file(tmp_path / "new" / "file") as path:
        path.write_text("x")
        assert not (tmp_path / "new" / "file").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_text() == "x"


def test_names_and_packages_that_do_not_do(tmp_path, monkeypatch):
    made(tmp_path / "ours", hovle())
    with pytest.raises(UserError, match=r"ends in \.gguf; give .*llama\.gguf"):
        export_as_gguf(tmp_path / "ours", tmp_path / "llama", say=quiet)
    (tmp_path / "old.gguf").write_text("x")
    with pytest.raises(UserError, match=r"old\.gguf exists; choose another name"):
        export_as_gguf(tmp_path / "ours", tmp_path / "old.gguf", say=quiet)
    assert (tmp_path / "old.gguf").read_text() == "x"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UserError, match=r'writing GGUF needs the package gguf; run: pip install "hovle_jax\[convert\]"'
    ):
        export_as_gguf(tmp_path / "ours", tmp_path / "new.gguf", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.gguf", "ours"]
