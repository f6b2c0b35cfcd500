"""A trained or imported model becomes a public checkpoint: safetensors in shards, their index, config.json."""

import dataclasses
import errno
import json
import math
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hovle_jax.config import HoVLEConfig, MeshConfig, ModelConfig
from hovle_jax.conversion.importing import PUBLIC_CONFIG, TOKENIZER_FILES
from hovle_jax.data.tokenizer import has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import hovle, internvl, llms
from hovle_jax.formats.mapping import nested, public_tensors
from hovle_jax.formats.source import INDEX
from hovle_jax.training.checkpoint import load_component, load_model_config
from hovle_jax.training.load import abstract_model
from hovle_jax.training.sharding import make_mesh

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9  # what transformers writes by default


def scheme(config: ModelConfig, image_id=0, special_tokens=()):
    """How a model is written in public: (rules over the dict of components, config.json).

    Args:
      image_id: the id of <IMG_CONTEXT>.
      special_tokens: names of the embedding's second table, in order.
    Raises:
      UserError: there is no public format for these components.
    """
    if config.embedding and config.llm:
        both = HoVLEConfig(config.embedding, config.llm)
        return hovle.rules(both), hovle.config_to_json(both, image_id, special_tokens)
    if config.teacher:
        if config.teacher.kind != "internvit":
            raise UserError("a CLIP teacher has no public format here; export the LLM or the HoVLE beside it")
        if config.teacher.projector != "mlp1":
            return internvl.tower_rules(config.teacher.vision), internvl.vision_to_json(config.teacher.vision)
        if not config.llm:
            raise UserError("an InternVL2 projector is public only beside its LLM; import both (without --as)")
        whole = internvl.InternVLConfig(config.teacher.vision, config.llm)
        return internvl.rules(whole), internvl.config_to_json(whole)
    if config.llm:
        return nested(llms.rules(config.llm), ours="llm"), llms.config_to_json(config.llm)
    raise UserError("nothing here has a public format: an LLM, a teacher, or an embedding with its LLM is needed")


def make_index(shapes, dtype, shard_bytes=SHARD_BYTES):
    """Tensors dealt out to files in their order, each file as full as it gets.

    Args:
      shapes: {public name: shape}.
    Returns:
      The index as transformers writes it: {"metadata": {"total_size"}, "weight_map": {name: file}}.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}


def export_model(source, folder, dtype="float32", shard_bytes=SHARD_BYTES, say=print):
    """Writes the model of a finished run or an import as a public checkpoint; `folder` appears when it is whole.

    Raises:
      UserError: no finished model, no public format for it, the folder exists, or the disk is full.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder).absolute()
    config = load_model_config(source)
    held = [f.name for f in dataclasses.fields(config) if (source / "model" / f.name).is_dir()]
    config = dataclasses.replace(config, **dict.fromkeys({"embedding", "llm", "clip", "teacher"} - set(held)))
    known = _public_config(source)
    rules, public_config = scheme(config, *_special_ids(source, known))
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder, or remove that one")
    mesh, wanted = make_mesh(MeshConfig()), {r.ours[0].split("/")[0] for r in rules}
    params = {c: load_component(source, c, abstract_model(config, c, mesh)) for c in wanted}
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(partial, public_tensors(rules, params), DTYPES[dtype], shard_bytes, say)
        text = json.dumps(merged(known, public_config) | {"torch_dtype": dtype}, indent=2)
        (partial / "config.json").write_text(text + "\n")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.rename(folder)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; nothing was left behind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _public_config(source):
    """The config.json that an import came with, or {}."""
    path = source / PUBLIC_CONFIG
    return json.loads(path.read_text()) if path.is_file() else {}


def _special_ids(source, known):
    """-> (id of <IMG_CONTEXT>, names of the second table): from the imported config, else from the run's tokenizer."""
    if "embedding_config" in known:
        embedding = known["embedding_config"]
        names = embedding.get("special_token_maps") or {}
        return embedding.get("img_context_token_id", 0), sorted(names, key=names.get)
    return (load_tokenizer(source).image_id if has_tokenizer(source) else 0), ()


def merged(known, ours):
    """The imported config.json with our values: what we do not know stays as it was."""
    both = known | ours
    return both | {k: merged(known[k], v) for k, v in ours.items() if isinstance(v, dict) and known.get(k)}


def write_tensors(folder, tensors, dtype, shard_bytes, say):
    """Writes {name: function} file by file; holds the tensors of one file at a time."""
    shapes = {name: jax.eval_shape(make).shape for name, make in tensors.items()}
    index = make_index(shapes, dtype, shard_bytes)
    files = {}
    for name, file in index["weight_map"].items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        arrays = {name: np.ascontiguousarray(np.asarray(tensors[name]()).astype(dtype, copy=False)) for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        say(f"{file}: {len(names)} tensors, {sum(a.nbytes for a in arrays.values()):,} bytes")
    if len(files) > 1:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
