"""What is fuzzed: valid files of each kind, made here, and the function that reads them as the project does."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import socket
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from tests.fuzz.mutate import FIXED, Files

REFUSALS = (UserError, BadSample)  # how a reader may say no


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
      seeds: -> valid file sets.
      read: reads a file set, with an empty folder to write it into; ends well or with one of `REFUSALS`.
      seconds: one input may take.
    """

    seeds: Callable[[], Sequence[Files]]
    read: Callable[[Files, pathlib.Path], None]
    seconds: float = 5


def written(files: Files, folder: pathlib.Path) -> pathlib.Path:
    """The folder, with these files in it."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _files(folder: pathlib.Path, pattern: str = "*") -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


@contextlib.contextmanager
def _folder():
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and images


def _images():
    from tests import broken

    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
    found = [broken.encoded(3, f) for f in formats]
    found += [broken.encoded(4, "PNG", mode) for mode in ("P", "L", "LA", "1")]
    found += [broken.encoded(5, "TIFF", compression="tiff_lzw"), broken.encoded(5, "JPEG", "CMYK")]
    return [{"image": content} for content in [*found, *broken.odd_images().values()]]


def _read_image(files, _):
    from hovle_jax.data import images

    with contextlib.suppress(BadSample):
        images.image_size(files["image"])
    images.decode_image(files["image"])


ROWS = [
    {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                  {"role": "assistant", "content": "A"}], "width": 3, "height": 4},
    {"images": ["1.png", "2.png"], "caption": "both", "width_list": [3, 4], "height_list": [5, 6]},
    {"question": "Which?", "answers": ["a", {"answer": "b"}], "choices": {"A": "x", "B": "y"}, "image": {"path": "z"}},
    {"text": "Plain text."},
]  # fmt: skip


def _jsonl():
    lines = [json.dumps(row) for row in ROWS]
    return [{"rows.jsonl": "\n".join(lines).encode()}, {"rows.jsonl": ("\ufeff" + lines[0] + "\r\n\n").encode()}]


def _rows(shard):
    """Reads the first rows of a shard as a run would."""
    from hovle_jax.data import images
    from hovle_jax.data.files.records import parse

    for index in range(min(len(shard), 12)):
        with contextlib.suppress(BadSample):
            record = parse(shard.row(index), "/nowhere")
            for image in record.images:
                if isinstance(image, bytes):
                    images.decode_image(image)
        shard.name(index)


@functools.cache
def _shard(kind):
    """An uncached shard: the caches go by a file's time, which two inputs may share."""

    def opened(self, make):
        if "_kept" not in self.__dict__:
            self.__dict__["_kept"] = make()
        return self.__dict__["_kept"]

    methods = {"opened": opened, "arrays": opened}
    return type(kind.__name__, (kind,), methods)


def _reads_shard(name, kind_name):
    def read(files, folder):
        from hovle_jax.data.files import shard_kinds

        shard_kinds._row_groups = _Uncached()
        path = written(files, folder) / name
        _rows(_shard(getattr(shard_kinds, kind_name))(str(path)))

    return read


class _Uncached:
    def get(self, _, make):
        return make()


def _tars():
    import tarfile

    from tests import broken

    made = []
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=format) as tar:
            for name, data in (
                ("a/" * 60 + "1.png", broken.encoded(1, size=(8, 8))),
                ("a/" * 60 + "1.json", json.dumps(ROWS[0]).encode()),
                ("2.txt", b"a caption"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        made.append({"rows.tar": out.getvalue()})
    return made


def _parquets():
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests import broken

    rows = {
        "image": [{"bytes": broken.encoded(i, size=(8, 8)), "path": "x"} for i in range(3)],
        "conversations": [ROWS[0]["conversations"]] * 3,
        "caption": ["a", "b", None],
        "n": [1, 2, 3],
    }
    made = []
    for compression in ("none", "snappy", "zstd"):
        out = io.BytesIO()
        pq.write_table(pa.table(rows), out, compression=compression, row_group_size=2)
        made.append({"rows.parquet": out.getvalue()})
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


FAMILIES = ("internlm2", "llama, yarn", "qwen2", "qwen3", "internvit", "internvl2", "hovle")


@functools.cache
def _checkpoints():
    from tests import public_models

    found = []
    for name in FAMILIES:
        with _folder() as folder:
            found.append(_files(public_models.public_folder(folder, name)))
    return found


def _configs():
    """With the number of the family, which mutations leave as it is."""
    files = [checkpoint["config.json"] for checkpoint in _checkpoints()]
    return [{"config.json": content, FIXED: str(i).encode()} for i, content in enumerate(files)]


def _shapes(checkpoint):
    """A source with the headers of a checkpoint, whose tensors need not be written for each config."""
    with _folder() as folder:
        from hovle_jax.formats.families import open_checkpoint

        return open_checkpoint(written(checkpoint, folder)).source.shapes


class _Headers:
    def __init__(self, shapes):
        self.shapes = shapes

    def file_of(self, _):
        return pathlib.Path("model.safetensors")

    def read(self, name):
        return np.zeros(self.shapes[name], np.float32)


@functools.cache
def _all_headers():
    return [_shapes(checkpoint) for checkpoint in _checkpoints()]


def _read_config(files, folder):
    """The config against the headers of its family; the tensors are not read."""
    from hovle_jax.formats import families, mapping

    source = _Headers(_all_headers()[int(files[FIXED])])
    (folder / "config.json").write_bytes(files["config.json"])
    original, families.SafetensorsFolder = families.SafetensorsFolder, lambda *_, **__: source
    try:
        checkpoint = families.open_checkpoint(folder)
    finally:
        families.SafetensorsFolder = original
    if zlib.crc32(files["config.json"]) % 8 == 0:  # it takes JAX a hundred times as long
        mapping.check(checkpoint.rules, source)


def _safetensors():
    from safetensors.numpy import save

    small = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}).encode()
    return [
        {"model.safetensors": save(small)},
        {"model.safetensors": save(small), "model.safetensors.index.json": index},
        {
            "model.safetensors": save(small, {"format": "pt"}),
            "other.safetensors": save({"c": np.zeros((2, 2), np.float32)}),
        },
    ]


def _read_safetensors(files, folder):
    from hovle_jax.formats.source import SafetensorsFolder

    source = SafetensorsFolder(written(files, folder))
    for name in source.shapes:
        source.read(name)


def _ggufs():
    from hovle_jax.config import ModelConfig
    from hovle_jax.conversion.gguf_file import write_gguf  # noqa: F401 (the writer of the package is there)
    from tests import bpe, gguf_files
    from tests.public_models import llm, random_params

    content = json.loads(bpe.trained().to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[:40]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3] + [1] * 37)
        writer.add_token_merges([])
        writer.add_eos_token_id(2)
        writer.add_chat_template(bpe.CHATML)

    made = []
    for arch, options in (("llama", {}), ("qwen3", dict(qk_norm=True, tied=True))):
        config = llm(arch, **options)
        with _folder() as folder:
            params = random_params(ModelConfig(llm=config), "llm")
            gguf_files.write_gguf(folder / "model.gguf", config, params, add, quantized=["blk.1.ffn_up.weight"])
            made.append(_files(folder))
    return made


def _read_gguf(files, folder):
    from hovle_jax.conversion.tokenizer_files import read_tokenizer
    from hovle_jax.formats.families import open_checkpoint

    path = written(files, folder) / "model.gguf"
    checkpoint = open_checkpoint(path)
    read_tokenizer(path, checkpoint)
    for name in checkpoint.source.shapes:
        checkpoint.source.read(name)


def _npz():
    out, packed = io.BytesIO(), io.BytesIO()
    arrays = {"input_ids": np.arange(6).reshape(2, 3), "logits": np.ones((2, 3, 4), np.float32)}
    np.savez(out, **arrays)
    np.savez_compressed(packed, **arrays)
    return [{"expected.npz": out.getvalue()}, {"expected.npz": packed.getvalue()}]


def _read_npz(files, folder):
    from hovle_jax.conversion.verify.run import read_reference

    read_reference(written(files, folder) / "expected.npz")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and templates


@functools.cache
def _tokenizers():
    from hovle_jax.data.text.tokenizer import SentencePieceTokenizer
    from tests import bpe, broken  # noqa: F401

    made = []
    pieces = SentencePieceTokenizer.train(["a few words of a few lines"] * 9, 300)
    for tokenizer in (bpe.tokenizer(), pieces, pieces.with_image_tokens()):
        tokenizer.chat_template = bpe.CHATML
        with _folder() as folder:
            tokenizer.save(folder)
            made.append(_files(folder) | {"tokenizer_settings.json": b'{"clean_up": true}'} if tokenizer is pieces
                        else _files(folder))  # fmt: skip
    return made


def _read_tokenizer(files, folder):
    from hovle_jax.data.text.tokenizer import load_tokenizer

    load_tokenizer(written(files, folder)).with_image_tokens()


def _imported_tokenizers():
    from hovle_jax.conversion.tokenizer_files import write_tokenizer
    from tests import bpe

    tokenizer = bpe.tokenizer()
    tokenizer.chat_template = bpe.CHATML
    with _folder() as folder:
        write_tokenizer(tokenizer, folder)
        made = _files(folder)
    return [made, made | {"added_tokens.json": b'{"<x>": 7}'}]


class _Opened:
    """What the tokenizer's import asks of a checkpoint."""

    kind, public_config = "llm", {"eos_token_id": 2}

    def components(self):
        import types

        return {"llm": types.SimpleNamespace(vocab_size=400)}


def _read_imported_tokenizer(files, folder):
    from hovle_jax.conversion.tokenizer_files import read_tokenizer

    read_tokenizer(written(files, folder), _Opened())


def _templates():
    from tests import bpe
    from tests.test_chat_templates import LLAMA2

    names = "{% set ns = namespace(i=0) %}{% macro f(m) %}{{ m['content'] | replace('a', 'b') }}{% endmacro %}"
    loop = "{% for m in messages if m.role != 'x' %}{{ loop.index0 }}{{ f(m) ~ '%5d' % 3 }}{{ m | tojson(indent=1) }}"
    other = names + loop + "{% set ns.i = ns.i * 2 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.i }}"
    return [{"chat_template.jinja": text.encode()} for text in (bpe.CHATML, LLAMA2, other)]


def _read_template(files, _):
    from hovle_jax.data.text import chat_template

    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    chat_template.render(files["chat_template.jinja"].decode("utf-8", "replace"), messages, "<s>", "</s>")


# ---------------------------------------------------------------------------------------------------------------------
# The roll-call


def _calls():
    call = {"host": 1, "hosts": 2, "name": "one", "config": {"steps": 3}}
    return [{"line": json.dumps(call).encode() + b"\n"}, {"line": b"GET / HTTP/1.1\r\n\r\n"}, {"line": b"[" * 9000}]


def _read_call(files, _):
    """A stranger's line, then the call of the host that was waited for: host 0 goes on, or says what is wrong."""
    from hovle_jax.hosts import rollcall

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()[:2]
    said, errors = {"name": "x", "config": {"steps": 3}}, []

    def lead():
        try:
            rollcall.roll_call(said, address, 2, 0, 2.0)
        except REFUSALS:
            pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=lead, daemon=True)
    thread.start()
    for _ in itertools.repeat(None, 200):
        with contextlib.suppress(OSError):
            with socket.create_connection(address, timeout=1) as line:
                line.sendall(files["line"])
            break
    with contextlib.suppress(*REFUSALS):
        rollcall.roll_call(said, address, 2, 1, 1.0)
    thread.join()
    if errors:
        raise errors[0]


READERS = {
    "images": Reader(_images, _read_image),
    "jsonl": Reader(_jsonl, _reads_shard("rows.jsonl", "JsonlShard")),
    "tar": Reader(_tars, _reads_shard("rows.tar", "TarShard")),
    "parquet": Reader(_parquets, _reads_shard("rows.parquet", "ParquetShard")),
    "safetensors": Reader(_safetensors, _read_safetensors),
    "gguf": Reader(_ggufs, _read_gguf),
    "config": Reader(_configs, _read_config, seconds=10),
    "npz": Reader(_npz, _read_npz),
    "tokenizer": Reader(_tokenizers, _read_tokenizer),
    "imported": Reader(_imported_tokenizers, _read_imported_tokenizer),
    "template": Reader(_templates, _read_template),
    "rollcall": Reader(_calls, _read_call, seconds=10),
}
