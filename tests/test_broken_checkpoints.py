"""What is wrong with a public checkpoint is said in one line, by name, and nothing is left behind."""

import errno
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.system.files import whole_folder
from tests.gguf_files import write_gguf
from tests.public_models import change_checkpoint, change_config, llm, public_folder, random_params
from tests.test_commands import ROOT, command

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def public(tmp_path):
    """A small public InternLM2 -> its folder."""
    return public_folder(tmp_path, "internlm2")


WQKV = "model.layers.1.attention.wqkv.weight"
BROKEN = {
    "wrong shape": (dict(tensors={WQKV: np.zeros((60, 32), np.float32)}), [WQKV, "[60, 32]"]),
    "transposed": (dict(tensors={"model.tok_embeddings.weight": np.zeros((32, 40), np.float32)}), ["tok_embeddings"]),
    "missing": (dict(tensors={WQKV: None}), ["lacks", WQKV]),
    "surplus": (dict(tensors={"extra": np.zeros(1, np.float32)}), ["unknown extra"]),
    "architecture": (dict(config={"model_type": "mamba"}), ["'mamba'", "internlm2", "qwen3"]),
    "option": (dict(config={"rope_scaling": {"type": "longrope"}}), ["rope_scaling", "longrope"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(name, public):
    changes, parts = BROKEN[name]
    change_checkpoint(public, changes.get("config"), **changes.get("tensors", {}))
    result = command("convert", "import", public, public.parent / "dst")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert not (public.parent / "dst").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be an integer of at least 1"),
        ({"vocab_size": "40"}, "vocab_size='40' must be an integer"),
        ({"rope_theta": "x"}, "rope_theta='x' must be a positive number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads=3"),
        ({"model_type": ["llama"]}, "is not supported"),
    ],
)
def test_config_values_that_make_no_sense(change, message, public):
    path = public / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"{path}.*{message}"):
        open_checkpoint(public)


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x"}}', "{"]
)
def test_a_broken_index(index, public):
    (public / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(public)


def test_types_that_float32_does_not_hold(public):
    change_checkpoint(public, **{WQKV: np.zeros((64, 32), np.float64)})
    with pytest.raises(UserError, match=rf"model\.safetensors: {WQKV} has the type F64; supported: F32, BF16, F16"):
        open_checkpoint(public)


def test_broken_files(public):
    path = public / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        open_checkpoint(public)
    path.write_bytes(whole)
    (public / "copy.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"is in copy\.safetensors and in model\.safetensors"):
        open_checkpoint(public)
    (public / "copy.safetensors").unlink()
    path.rename(public / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle files \(pytorch_model\.bin\)"):
        open_checkpoint(public)
    (public / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_checkpoint(public)


def test_values_that_are_not_finite_are_counted(public, caplog):
    bad = np.zeros((40, 32), np.float32)
    bad[0, :3] = np.nan
    change_checkpoint(public, **{"output.weight": bad})
    with caplog.at_level(logging.WARNING):
        open_checkpoint(public).load()
    assert "output.weight: 3 of 1280 values are not finite" in caplog.text


@pytest.mark.parametrize("action", ["import", "export"])
def test_what_cannot_be_written_leaves_nothing(action, public, tmp_path):
    """Files may not grow beyond some bytes in this process: the system's refusal comes through all the libraries."""
    source = {"import": public, "export": tmp_path / "ours"}[action]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", sys.executable, "-m", "hovle_jax.convert"]
    line = [*limited, action, source, tmp_path / "out"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: cannot write {tmp_path / 'out'}: File too large; nothing was left behind\n"
    assert not list(tmp_path.glob("out*"))


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    reported = "RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"  # as tensorstore says it
    with pytest.raises(UserError, match="the disk is full"), whole_folder(tmp_path / "out"):
        raise ValueError(reported)
    with pytest.raises(KeyError), whole_folder(tmp_path / "new" / "out"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()  # somebody else's
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"), whole_folder(tmp_path / "file"):
        pass
    (tmp_path / "file").unlink()
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"out", "out/file", "out.partial"}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes that no file has, which nothing may be built of.

HUGE = 10**9
HOSTILE = {  # model, keys to the config's part, changes, what the line says
    "layers": ("internlm2", (), {"num_hidden_layers": HUGE}, r"num_layers=1,000,000,000 is not possible: .* 17 t"),
    "layers of the embedding": ("hovle", ("embedding_config",), {"num_hidden_layers": HUGE}, "embedding.stack: num_l"),
    "layers of its LLM": ("hovle", ("llm_config",), {"num_hidden_layers": HUGE}, "llm.stack: num_layers=1,000,000"),
    "layers of Llama": ("llama", (), {"num_hidden_layers": HUGE}, "num_layers=1,000,000,000 is not possible"),
    "layers of a tower": ("internvit", (), {"num_hidden_layers": HUGE}, "num_layers=1,000,000,000 is not possible"),
    "no layers of a tower": ("internvit", (), {"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at"),
    "no patch": ("hovle", ("embedding_config",), {"patch_size": 0}, "patch_size=0 must be an integer of at least 1"),
    "patches": ("internvit", (), {"patch_size": 2**40, "image_size": 2**40}, "patch_size=1,099,"),
    "positions": (
        "hovle",
        ("embedding_config",),
        {"image_size": 14 * HUGE},
        "image_size=14,000,000,000 is not possible",
    ),
    "tiles": ("hovle", (), {"force_image_size": 14 * HUGE}, "is not possible: a tile has at most 8,192 pixels"),
    "pixels of a tower": ("internvit", (), {"image_size": 14 * HUGE, "patch_size": 14}, "image_size=14,000,000,000"),
    "width": ("internlm2", (), {"hidden_size": 2**60, "num_attention_heads": 4}, "width=1,152,921,504,606,846,976"),
    "vocabulary": ("internlm2", (), {"vocab_size": HUGE}, "vocab_size=1,000,000,000 is not possible: no dim"),
    "heads": ("llama", (), {"num_attention_heads": HUGE, "num_key_value_heads": HUGE}, "num_heads=1,000,000,000"),
    "length": ("internlm2", (), {"max_position_embeddings": 2**40}, "max_length=1,099,511,627,776 is not possible"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_size_that_no_tensor_has(case, tmp_path):
    name, path, changes, message = HOSTILE[case]
    folder = public_folder(tmp_path, name)
    change_config(folder, *path, **changes)
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        open_checkpoint(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Values of a wrong type, and files that are no files.


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("hovle", (), "normalize_encoder_output"),
        ("hovle", ("embedding_config",), "use_pixel_shuffle_proj"),
        ("internlm2", (), "bias"),
        ("internlm2", (), "tie_word_embeddings"),
        ("internvit", (), "qkv_bias"),
        ("internvit", (), "qk_normalization"),
        ("llama", (), "attention_bias"),
        ("llama", (), "mlp_bias"),
        ("qwen2", (), "use_sliding_window"),
    ],
)
def test_what_is_neither_true_nor_false(name, path, key, tmp_path):
    folder = public_folder(tmp_path, name)
    for value in ("false", [1], 3):
        change_config(folder, *path, **{key: value})
        with pytest.raises(UserError, match=f"{key}=.* must be true or false"):
            open_checkpoint(folder)


def test_rotary_scalings_of_the_embedding_are_not_read_past(tmp_path):
    folder = public_folder(tmp_path, "hovle")
    change_config(folder, "embedding_config", rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises(UserError, match="embedding_config: rope_scaling=.*yarn.* is not supported"):
        open_checkpoint(folder)
    change_config(folder, "embedding_config", rope_scaling={"type": "linear", "factor": 2.0})
    assert open_checkpoint(folder).config.embedding.stack.rope_scaling.kind == "linear"
    change_config(
        folder, "embedding_config", rope_scaling={"type": "dynamic", "factor": 3.0}, max_position_embeddings=7
    )
    scaling = open_checkpoint(folder).config.embedding.stack.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("dynamic", 3.0, 7)


def test_tokens_of_a_tile_that_public_code_would_count_otherwise(tmp_path):
    folder = public_folder(tmp_path, "hovle")
    change_config(folder, downsample_ratio=1.0)
    with pytest.raises(UserError, match=r"downsample_ratio=1\.0 is not supported; supported: 0\.5"):
        open_checkpoint(folder)


def test_files_outside_the_folder_are_not_read(public):
    (public.parent / "outside.safetensors").write_bytes((public / "model.safetensors").read_bytes())
    for name in (
        "../outside.safetensors",
        "/etc/hostname",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "a" * 256,
        "\0",
        "",
    ):
        (public / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="it must name files in its own folder"):
            open_checkpoint(public)


def test_weights_that_are_no_regular_file(public):
    weights = public / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is not a regular file") as raised:
        open_checkpoint(public)
    assert "index" not in str(raised.value)
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(.*symbolic links\)"):
        open_checkpoint(public)


def test_json_nested_without_end(public):
    (public / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        open_checkpoint(public)
    (public / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        open_checkpoint(public)


def gguf_with(path, add):
    config = llm("llama")
    write_gguf(path, config, random_params(ModelConfig(llm=config), "llm"), add)
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", 0, "attention.head_count=0 must be an integer of at least 1"),
        ("block_count", HUGE, "num_layers=1,000,000,000 is not possible"),
        ("embedding_length", 2**31, "width=2,147,483,648 is not possible"),
        ("vocab_size", HUGE, "vocab_size=1,000,000,000 is not possible"),
    ],
)
def test_sizes_of_a_gguf(key, value, message, tmp_path):
    def add(writer):
        writer.add_vocab_size(40)
        kind = writer.kv_data[0][f"llama.{key}"].type
        del writer.kv_data[0][f"llama.{key}"]
        writer.add_key_value(f"llama.{key}", value, kind)

    path = gguf_with(tmp_path / "model.gguf", add)
    with pytest.raises(UserError, match=rf"model\.gguf.*{message}"):
        open_checkpoint(path)


def test_a_gguf_with_text_that_is_none(tmp_path):
    def add(writer):
        writer.add_vocab_size(40)
        writer.add_name("a model's name")

    path = gguf_with(tmp_path / "model.gguf", add)
    open_checkpoint(path)
    path.write_bytes(path.read_bytes().replace(b"a model's name", b"a \xff\xfe model's"))
    with pytest.raises(UserError, match="not a complete GGUF file"):
        open_checkpoint(path)
