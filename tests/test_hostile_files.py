"""Files of strangers whose counts, offsets and names are wrong: refused by name, before memory is taken."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

from hovle_jax.conversion.verify import run
from hovle_jax.conversion.verify.run import read_reference
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.shard_kinds import ParquetShard, TarShard, _check_counts
from hovle_jax.data.images import decode_image
from hovle_jax.data.text.tokenizer import SETTINGS, SentencePieceTokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats.gguf import GGUFFile
from hovle_jax.formats.source import SafetensorsFolder
from hovle_jax.system import command_line
from tests import bpe, broken

# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def safetensors(header, data=b"", length=None):
    """A file's bytes; `header` is text or a JSON value."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE_SAFETENSORS = {
    "empty": (b"", "header"),
    "header beyond the file": (safetensors({}, length=2**62), "header has 4,611,686,018,427,387,904 bytes"),
    "header of 20 MB": (safetensors(" " * 20_000_000), "header has 20,000,000 bytes; 16,777,216 are possible"),
    "nested": (safetensors("[" * 100_000), "recursion"),
    "no object": (safetensors([1]), "deserializing"),
    "double": (
        safetensors(f'{{"a": {json.dumps(tensor())}, "a": {json.dumps(tensor())}}}', bytes(16)),
        "'a' is there twice",
    ),
    "double key of a tensor": (
        safetensors('{"a": {"dtype": "F32", "shape": [4], "shape": [2], "data_offsets": [0, 16]}}', bytes(16)),
        "'shape' is there twice",
    ),
    "overlap": (safetensors({"a": tensor(), "b": tensor(8, 24)}, bytes(24)), "deserializing"),
    "hole": (safetensors({"a": tensor(), "b": tensor(32, 48)}, bytes(48)), "deserializing"),
    "negative offsets": (safetensors({"a": tensor(-16, 0)}, bytes(16)), "deserializing"),
    "backwards": (safetensors({"a": tensor(16, 0)}, bytes(16)), "deserializing"),
    "beyond the file": (safetensors({"a": tensor(0, 2**40, (2**38,))}, bytes(16)), "deserializing"),
    "sizes that wrap": (safetensors({"a": tensor(0, 16, (2**62, 4))}, bytes(16)), "deserializing"),
    "other size": (safetensors({"a": tensor(0, 16, (5,))}, bytes(16)), "deserializing"),
    "bytes after it": (safetensors({"a": tensor()}, bytes(17)), "deserializing"),
    "half numbers": (
        safetensors('{"a": {"dtype": "F32", "shape": [4.5], "data_offsets": [0, 16]}}'),
        "deserializing",
    ),
    "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "Expecting value"),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(name, tmp_path):
    content, message = HOSTILE_SAFETENSORS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors is not a complete safetensors file \(.*{message}"):
        SafetensorsFolder(tmp_path)


def test_the_same_bytes_without_a_fault_are_read(tmp_path):
    data = np.arange(4, dtype=np.float32)
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": tensor()}, data.tobytes()))
    np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read("a"), data)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def text(content):
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def stored(name="a", shape=(4,), kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def gguf(keys=(), tensors=(), data=b"", num_keys=None, num_tensors=None, magic=0x46554747, version=3):
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = struct.pack("<IIQQ", magic, version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def array(kind, length, content=b""):
    return struct.pack("<IQ", kind, length) + content


UINT8, UINT32, FLOAT32, STRING, ARRAY = 0, 4, 6, 8, 9
HOSTILE_GGUF = {
    "empty": (b"", "empty file"),
    "cut": (gguf()[:20], "are left"),
    "another kind of file": (gguf(magic=1), "does not begin with GGUF"),
    "big-endian": (gguf(version=3 << 24), "its version is 50331648; 2 and 3 are supported, little-endian"),
    "keys beyond the file": (gguf(num_keys=2**63), "it has 9,223,372,036,854,775,808 keys"),
    "tensors beyond the file": (gguf(num_tensors=2**40), "it has 1,099,511,627,776 tensors"),
    "array of 2^40 numbers": (gguf([key("a", ARRAY, array(UINT8, 2**40))]), "it has 1,099,511,627,776 values"),
    "array of 2^40 texts": (gguf([key("a", ARRAY, array(STRING, 2**40))]), "it has 1,099,511,627,776 values"),
    "many numbers": (gguf([key("a", ARRAY, array(UINT8, 2**22 + 1, bytes(2**22 + 1)))]), "more than 4,194,304 values"),
    "array of arrays": (gguf([key("a", ARRAY, array(ARRAY, 1, array(UINT8, 0)))]), "values of the type 9"),
    "text beyond the file": (gguf([key("a", STRING, struct.pack("<Q", 2**63))]), "bytes of text"),
    "unknown type of a value": (gguf([key("a", 99, b"")]), "the unknown type 99"),
    "key twice": (gguf([key("a", UINT8, b"1"), key("a", UINT8, b"1")]), "the key 'a' is there twice"),
    "key that is no text": (gguf([key(b"\xff", UINT8, b"1")]), "utf-8"),
    "text that is none": (gguf([key("a", STRING, text(b"\xff\xfe"))]), "utf-8"),
    "tensor twice": (gguf(tensors=[stored(), stored()], data=bytes(64)), "the tensor 'a' is there twice"),
    "dimensions": (gguf(tensors=[stored(shape=(1,) * 9)], data=bytes(64)), "has 9 dimensions; 4 are possible"),
    "no numbers": (gguf(tensors=[stored(shape=(0, 4))], data=bytes(64)), r"the shape \[4, 0\], which holds no number"),
    "type of a tensor": (gguf(tensors=[stored(kind=77)], data=bytes(64)), "unknown type 77"),
    "a block without axes": (gguf(tensors=[stored(shape=(), kind=8)], data=bytes(64)), "rows of 1 numbers, in blocks"),
    "half a block": (gguf(tensors=[stored(shape=(33,), kind=8)], data=bytes(64)), "rows of 33 numbers, in blocks of"),
    "size that wraps": (gguf(tensors=[stored(shape=(2**62, 2**62))], data=bytes(64)), "and the file has 1"),
    "offset beyond the file": (gguf(tensors=[stored(start=2**63)], data=bytes(64)), "and the file has 1"),
    "one place for many": (
        gguf(tensors=[stored(str(i), (64,)) for i in range(50)], data=bytes(256)),
        "12,800 bytes together",
    ),
    "alignment": (gguf([key("general.alignment", UINT32, struct.pack("<I", 3))]), "alignment=3 is not a power of two"),
    "alignment of a text": (gguf([key("general.alignment", STRING, text("x"))]), "'x' is not a power of two"),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_hostile_gguf(name, tmp_path):
    content, message = HOSTILE_GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.gguf is not a complete GGUF file \(.*{message}"):
        GGUFFile(path)


def test_a_gguf_without_a_fault_is_read(tmp_path):
    values = np.arange(8, dtype=np.float32)
    keys = [
        key("n", UINT32, struct.pack("<I", 7)),
        key("texts", ARRAY, array(STRING, 2, text("a") + text("é"))),
        key("numbers", ARRAY, array(FLOAT32, 2, struct.pack("<2f", 1, 2))),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(keys, [stored(shape=(4, 2))], values.tobytes()))
    file = GGUFFile(path)
    assert file.metadata == {"n": 7, "texts": ["a", "é"], "numbers": [1.0, 2.0]}
    assert file.shapes == {"a": (2, 4)}
    np.testing.assert_array_equal(file.read("a"), values.reshape(2, 4))


def test_a_gguf_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="not a regular file"):
        GGUFFile(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer in a run's folder


def save(content, folder):
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))


def library_json():
    return json.loads(bpe.trained().to_str())


def with_id(index):
    content = library_json()
    content["model"]["vocab"]["zzz"] = index
    return content


HOSTILE_TOKENIZERS = {  # content, settings, what the line says
    "empty": ("", {}, ""),
    "cut": ('{"version": "1.0", "trunc', {}, ""),
    "list": ([1], {}, ""),
    "huge id": (with_id(2**32 - 2), {}, "has the id 4,294,967,294 and only"),
    "unknown setting": (library_json(), {"x": 1}, ""),
    "unknown stop": (library_json(), {"stops": ["no"]}, "no special token 'no'"),
    "settings of another kind": (library_json(), {"stops": 3}, ""),
}


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_of_a_folder(name, tmp_path):
    content, settings, message = HOSTILE_TOKENIZERS[name]
    save(content, tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"the tokenizer in {tmp_path} cannot be read \(.*{message}"):
        load_tokenizer(tmp_path)


def test_broken_files_beside_a_tokenizer(tmp_path):
    save(library_json(), tmp_path)
    load_tokenizer(tmp_path)
    for content in (b"", b"[", b"[1]", b"\xff\xfe"):
        (tmp_path / SETTINGS).write_bytes(content)
        with pytest.raises(UserError, match="the tokenizer in .* cannot be read"):
            load_tokenizer(tmp_path)


def test_texts_keep_their_length_whatever_a_file_asks_for(tmp_path):
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    save(library_json() | {"padding": padding, "truncation": truncation}, tmp_path)
    assert load_tokenizer(tmp_path).encode("hello there") == bpe.tokenizer().encode("hello there")


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("pre_tokenizer", [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]),
        ("normalizer", [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}]),
    ],
)
def test_steps_that_make_a_text_endless(part, steps, tmp_path):
    save(library_json() | {part: {"type": "Sequence", f"{part}s".replace("_", ""): steps * 50}}, tmp_path)
    with pytest.raises(UserError, match=r"make a text up to [0-9,]+ times as long; 1,000 are possible"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("index", [2**40, 1.5, "7", None, True])
def test_added_tokens_have_ids_of_the_vocabulary(index, tmp_path):
    SentencePieceTokenizer.train(["a few words of a few lines"] * 9, 300).save(tmp_path)
    load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": index}))
    with pytest.raises(UserError, match="has the id"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Reference outputs


def npz(path, **members):
    """Members as they are given: bytes, in files named after them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("_", "."), content)


def npy(shape, data=b"", dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


HOSTILE_NPZ = {
    "more than there is": (dict(a_npy=npy((2**40,))), "'a.npy' says that it has 4,398,046,511,104 bytes, and there"),
    "a bomb": (dict(a_npy=npy((2**20,), bytes(2**22))), "'a.npy' grows from .* to 4,194,3.. bytes"),
    "no array": (dict(a_txt=b"x"), "'a.txt' is no array"),
    "a header that is none": (dict(a_npy=b"\x93NUMPY\1\0" + struct.pack("<H", 4) + b"'\0'\n"), ""),
    "a magic that is none": (dict(a_npy=b"GIF89a"), ""),
    "pickles": (dict(a_npy=npy((1,), b"cos\nsystem\n", "|O")), ""),
}


@pytest.mark.parametrize("name", HOSTILE_NPZ)
def test_hostile_reference_outputs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST_EXPANSION", 3)
    members, message = HOSTILE_NPZ[name]
    npz(tmp_path / "expected.npz", **members)
    with pytest.raises(UserError, match=rf"expected\.npz cannot be read \(.*{message}"):
        read_reference(tmp_path / "expected.npz")


def test_reference_outputs_with_broken_compression(tmp_path):
    npz(tmp_path / "expected.npz", a_npy=npy((64,), np.arange(64, dtype="f4").tobytes()))
    read_reference(tmp_path / "expected.npz")
    content = bytearray((tmp_path / "expected.npz").read_bytes())
    for at in range(40, 60):
        content[at] ^= 0xFF
    (tmp_path / "expected.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_reference(tmp_path / "expected.npz")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and images


def tar(size, kind=b"0", name=b"0001.json", data=b"{}"):
    """One member whose header states this size."""
    octal = f"{size:011o}\0".encode() if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + octal + b"00000000000\0"
    head = bytearray(head + b" " * 8 + kind + bytes(100) + b"ustar\00000".ljust(255, b"\0"))
    head[148:156] = f"{sum(head[:512]):06o}\0 ".encode()
    return bytes(head[:512]) + data.ljust(512, b"\0")


@pytest.mark.parametrize("size", [2**40, 2**62, 2**63, 2**80])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"], ids=["member", "long name", "pax header"])
def test_a_tar_header_that_states_more_than_there_is(size, kind, tmp_path, own_cache):
    path = tmp_path / "rows.tar"
    path.write_bytes(tar(2, name=b"0000.json") + tar(size, kind))
    shard = TarShard(str(path))
    assert shard.row(0) == {}
    for index in range(1, len(shard)):
        with pytest.raises(BadSample, match="truncated_shard|row_too_large|cannot be read as a tar"):
            shard.row(index)


def test_a_row_group_of_more_rows_than_any_memory_holds():
    for rows in (-1, 2**24 + 1, 2**62):
        with pytest.raises(ValueError, match="row group 1 has"):
            _check_counts([3, rows])
    _check_counts([0, 2**24])


def test_a_parquet_file_whose_names_are_no_text(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(content.replace(b"caption", b"capt\xff\xfen"))
    shard = ParquetShard(str(tmp_path / "rows.parquet"))
    with pytest.raises((UserError, BadSample), match=r"utf-8|utf8|UTF8"):
        shard.row(0)


def test_an_image_of_a_million_columns():
    """libwebp takes minutes to decode an animation of this size."""
    content = bytearray(broken.odd_images()["animated_webp"])
    at = content.index(b"VP8X") + 12
    content[at : at + 3] = (10**6 - 1).to_bytes(3, "little")
    with pytest.raises(BadSample, match="1000000 x 32 pixels"):
        decode_image(bytes(content))


def test_an_error_steers_no_terminal(capsys):
    with pytest.raises(SystemExit):
        command_line._fail("no file at \x1b[2J\u202egnp.x\ud800, it is\nnot there")
    assert capsys.readouterr().err == "error: no file at \\x1b[2J\\u202egnp.x\\ud800, it is not there\n"
