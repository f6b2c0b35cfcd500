"""Exports a trained or imported model as a public checkpoint: safetensors in shards, their index, config.json."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from flax import traverse_util

from hovle_jax.checkpoints import load_component, load_model_config
from hovle_jax.components import Params, shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.companions import drop_missing_code
from hovle_jax.conversion.importing import NOTE, PUBLIC
from hovle_jax.conversion.tokenizer_files import BUILT_IN, OTHER, write_tokenizer
from hovle_jax.data.text.tokenizer import IMAGE_TOKEN, Tokenizer, has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import clips, hf_clip, hovle, internvl, llms
from hovle_jax.formats.mapping import Array, Rule, nested, public_shapes, public_tensors
from hovle_jax.formats.source import INDEX, is_counter
from hovle_jax.formats.tiling import tiling_to_json
from hovle_jax.model.config import HoVLEConfig, ViTConfig
from hovle_jax.system.files import read_json, whole_folder, write_json

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
COUNTED = np.dtype(np.int64)
NAMES = {DTYPES["float32"]: "F32", DTYPES["bfloat16"]: "BF16", COUNTED: "I64"}  # in a safetensors header
LAYOUTS = {"huggingface": clips.HUGGING_FACE, "open_clip": clips.OPEN_CLIP}  # of a CLIP, by --as
SHARD_BYTES = 5 * 10**9  # what transformers writes by default
SMALL, TOGETHER = 2**24, 2**29  # bytes of a leaf, and of all that are read together
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of public tensors, by name


def public_format(config: ModelConfig, tokenizer: Tokenizer | None = None) -> tuple[list[Rule], dict[str, Any]]:
    """The public format of a model: (rules over the dict of components, config.json).

    Args:
      tokenizer: gives the id of <IMG_CONTEXT> and the names of the embedding's second table.
    Raises:
      UserError: these components have no public format.
    """
    if config.embedding and config.llm:
        both = HoVLEConfig(config.embedding, config.llm)
        specials = {} if tokenizer is None else tokenizer.specials
        public = hovle.config_to_json(both, specials.get(IMAGE_TOKEN, 0), specials)
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        return hovle.rules(both), public | {"template": OTHER if has_template else BUILT_IN[0]}
    if config.teacher:
        if config.teacher.kind != "internvit":
            raise UserError("a CLIP teacher cannot be exported; export the LLM or the HoVLE of this model")
        vision = config.teacher.vision
        assert isinstance(vision, ViTConfig), "a ResNet is a CLIP's"
        if config.teacher.projector != "mlp1" or not config.llm:
            return internvl.tower_rules(vision), internvl.vision_to_json(vision)
        whole = internvl.InternVLConfig(vision, config.llm)
        return internvl.rules(whole), internvl.config_to_json(whole)
    if config.clip:
        layout = clips.layout_of(config.clip)
        public = layout.config_to_json(config.clip)
        return nested(layout.rules(config.clip), ours="clip"), public
    if config.llm:
        return nested(llms.rules(config.llm), ours="llm"), llms.config_to_json(config.llm)
    raise UserError(
        "this model has no public format: an LLM, a CLIP, a teacher, or an embedding with its LLM is needed"
    )


def make_index(
    shapes: Shapes, dtype: np.dtype, shard_bytes: int = SHARD_BYTES, stem: str = "model"
) -> dict[str, dict[str, Any]]:
    """Assigns tensors to files in their order; each file is filled up to `shard_bytes`.

    Args:
      shapes: {public name: shape}.
      dtype: the type that is written.
      shard_bytes: a larger tensor has a file of its own.
      stem: what the files' names begin with.
    Returns:
      The index as transformers writes it: {"metadata": {"total_size"}, "weight_map": {name: file}}.
    """
    sizes = {name: math.prod(shape) * type_of(name, dtype).itemsize for name, shape in shapes.items()}
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}


def export_model(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], object] = print,
    layout: str | None = None,
) -> None:
    """Writes the model of a finished run or an import as a public checkpoint; `folder` appears when it is complete.

    Parameters are read and written leaf by leaf: memory never holds more than one that is large, with all its layers,
    and half a gigabyte of small ones.

    Args:
      dtype: 'float32' or 'bfloat16'; None = the type of the imported tensors, or float32 for a trained model.
      layout: of `LAYOUTS`, for a CLIP; None = the one that it came in, or Hugging Face's for a trained one.
    Raises:
      UserError: there is no finished model, it has no public format, the folder exists, or the disk is full.
    """
    source = pathlib.Path(source)
    config, form = stored_config(source), clips.HUGGING_FACE
    own_form = form
    if config.clip:
        own_form = clips.layout_of(config.clip)
        form = LAYOUTS[layout] if layout else own_form
        config = dataclasses.replace(config, clip=clips.in_layout(config.clip, form))
    elif layout:
        raise UserError(f"--as {layout} is for a CLIP, and {source} holds none: leave it out")
    dtype = dtype or own_dtype(source)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    rules, public_config = public_format(config, tokenizer)
    components = dict.fromkeys(r.ours[0].split("/")[0] for r in rules)
    abstract = {c: shapes(config, c) for c in components}
    if config.teacher and not config.llm and abstract["teacher"].pop("mlp1", None):
        say("left out: mlp1, the teacher's projector, which is public only together with its LLM (import without --as)")

    if config.embedding:
        public_config |= tiling_to_json(config)
    if config.system_message:
        public_config |= {"system_message": config.system_message}
    with whole_folder(folder) as partial:
        write_tensors(
            partial,
            public_shapes(rules, abstract),
            public_tensors(rules, leaf_reader(source, abstract)),
            DTYPES[dtype],
            shard_bytes,
            say,
            form.stem,
        )
        public = source / PUBLIC
        if public.is_dir():
            # Of another layout's files those that both have, such as the tokenizer's.
            others = () if form is own_form else (own_form.config_file, hf_clip.PREPROCESSOR)
            shutil.copytree(public, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*others))
            if form is own_form:
                public_config = json.loads((public / form.config_file).read_text())  # with the keys that we do not read
        elif tokenizer is not None:
            write_tokenizer(tokenizer, partial)
        if config.clip and form is clips.HUGGING_FACE and not (partial / hf_clip.PREPROCESSOR).is_file():
            write_json(partial / hf_clip.PREPROCESSOR, hf_clip.preprocessor_to_json(config.clip))
        if form is clips.HUGGING_FACE:
            public_config = with_dtype(public_config | {"torch_dtype": dtype}, dtype)
        (partial / form.config_file).write_text(json.dumps(public_config, indent=2) + "\n")
        if form is clips.HUGGING_FACE:
            drop_missing_code(partial, say)


def stored_config(source: pathlib.Path) -> ModelConfig:
    """The config of a model's folder, with the components alone that are stored there."""
    config = load_model_config(source)
    stored = {f.name for f in dataclasses.fields(config) if (source / "model" / f.name).is_dir()}
    return dataclasses.replace(config, **dict.fromkeys({"embedding", "llm", "clip", "teacher"} - stored))


def leaf_reader(source: pathlib.Path, abstract: Params) -> Callable[[str], Array]:
    """A function that reads one leaf of a model's folder, 'component/key/...', onto the host.

    Small leaves are read together and kept: a ResNet has hundreds, and each reading takes a fifth of a second.

    Args:
      abstract: {component: shapes of its parameters}.
    """
    leaves: dict[str, dict[str, Any]] = {c: traverse_util.flatten_dict(tree, sep="/") for c, tree in abstract.items()}
    small = {component: _small(found) for component, found in leaves.items()}

    def load(component, wanted) -> dict[str, Any]:
        tree = load_component(source, component, traverse_util.unflatten_dict(wanted, sep="/"))
        return traverse_util.flatten_dict(tree, sep="/")

    @functools.cache
    def together(component):
        return load(component, {name: leaves[component][name] for name in small[component]})

    def read(path: str) -> Array:
        component, name = path.split("/", 1)
        if name in small[component]:
            return together(component)[name]
        return load(component, {name: leaves[component][name]})[name]

    return read


def _small(leaves):
    """Names of the leaves that are read together: small ones, as many as may lie in memory."""
    names, total = set(), 0
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape) * 4
        if size <= SMALL and total + size <= TOGETHER:
            names.add(name)
            total += size
    return names


def own_dtype(source: str | os.PathLike) -> str:
    """The type that stores a model without loss: an import's own, else float32."""
    path = pathlib.Path(source) / NOTE
    return read_json(path, ["dtype"])["dtype"] if path.is_file() else "float32"


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A public config whose keys, nested ones too, name this type."""
    config = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return config | {key: dtype for key in ("dtype", "torch_dtype") if key in config}


def write_tensors(
    folder: pathlib.Path,
    shapes: Shapes,
    tensors: Iterable[tuple[str, Array]],
    dtype: np.dtype,
    shard_bytes: int,
    say: Callable[[str], object],
    stem: str = "model",
    has_index: bool = False,
) -> None:
    """Writes safetensors files and, for more than one, their index.

    Args:
      shapes: {public name: shape}.
      tensors: (public name, array), in the same order.
      stem: what the files' names begin with.
      has_index: an index for one file, too.
    """
    index = make_index(shapes, dtype, shard_bytes, stem)
    files = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, []).append(name)
    tensors = iter(tensors)
    for file, names in files.items():
        with (folder / file).open("wb") as stream:
            stream.write(safetensors_header({name: shapes[name] for name in names}, dtype))
            for expected in names:
                name, tensor = next(tensors)
                assert (name, tensor.shape) == (expected, shapes[expected])
                tensor = np.ascontiguousarray(tensor.astype(type_of(name, dtype), copy=False))
                stream.write(tensor.reshape(-1).view(np.uint8).data)
        say(f"{file}: {len(names)} tensors, {(folder / file).stat().st_size:,} bytes")
    if has_index or len(files) > 1:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def type_of(name: str, dtype: np.dtype) -> np.dtype:
    """In which a tensor of an export is written: counters are never rounded."""
    return COUNTED if is_counter(name) else dtype


def safetensors_header(shapes: Shapes, dtype: np.dtype) -> bytes:
    """The header of a safetensors file, which the tensors follow one after another.

    The library's writer needs all tensors of a file in memory at once. The header is a length in 8 bytes, JSON with
    each tensor's type, shape and offsets, and spaces up to a multiple of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        kind = type_of(name, dtype)
        end = at + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
