"""Exports an LLM, or a base HoVLE as one Llama, as one GGUF file for llama.cpp."""

import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hovle_jax.components import select, shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.exporting import leaf_reader, own_dtype, stored_config
from hovle_jax.conversion.llama_folder import say_if_blanks_change, template_of
from hovle_jax.data.text.tokenizer import has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf, gguf_metadata, one_llama
from hovle_jax.formats.mapping import Array, Rule, nested, public_shapes, public_tensors
from hovle_jax.model.config import HoVLEConfig, LLMConfig
from hovle_jax.system.files import whole_file

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16")}


def export_as_gguf(
    source: str | os.PathLike,
    path: str | os.PathLike,
    dtype: str | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Writes the LLM or the base HoVLE of a finished run or an import; `path` appears when it is complete.

    Parameters are read and written leaf by leaf, as by `export_model`.

    Args:
      path: ends in .gguf.
      dtype: 'float32', 'float16' or 'bfloat16'; None = the type of the imported tensors, or float32 for a trained
        model. Norms, biases and rotary factors are always float32, as llama.cpp computes with them.
    Raises:
      UserError: there is no finished LLM, llama.cpp cannot compute it, the file exists, the package `gguf` is missing,
        a number exceeds float16, or the disk is full.
    """
    source, path = pathlib.Path(source), pathlib.Path(path)
    if path.suffix != ".gguf":
        raise UserError(f"export --as gguf writes one file whose name ends in .gguf; give {path}.gguf")
    config = stored_config(source)
    llm, rules = one_llm(config)
    _say_what_is_left_out(config, llm, say)
    dtype = dtype or own_dtype(source)
    metadata = gguf_metadata.config_to_metadata(llm) | _tokenizer_metadata(source, llm.vocab_size, config, say)
    wanted = {tuple(leaf.split("/")) for r in rules for leaf in r.ours}
    whole = {component: shapes(config, component) for component in sorted({leaf[0] for leaf in wanted})}
    abstract = select(whole, lambda leaf: leaf in wanted)
    sizes, tensors = public_shapes(rules, abstract), public_tensors(rules, leaf_reader(source, abstract))
    factors = gguf_metadata.rope_factors(llm.stack)
    with whole_file(path) as partial:
        write_gguf(partial, llm.family, metadata, sizes, tensors, dtype, factors)
        say(f"{path.name}: {len(sizes)} tensors, {partial.stat().st_size:,} bytes")


def one_llm(config: ModelConfig) -> tuple[LLMConfig, list[Rule]]:
    """-> (the LLM that llama.cpp computes, the rules of its tensors over the components).

    Raises:
      UserError: there is none; says what is in the way.
    """
    if config.llm is None:
        raise UserError("this model holds no LLM: export --as gguf takes an LLM, or an embedding with its LLM")
    if config.embedding is None:
        llm = gguf_metadata.llama_cpp_config(config.llm)
        return llm, nested(gguf.rules(llm), ours="llm")
    both = HoVLEConfig(config.embedding, config.llm)
    return gguf_metadata.llama_cpp_config(one_llama.llm_config(both)), one_llama.rules(both, one_llama.GGUF)


def _say_what_is_left_out(config, llm, say):
    parts = [part.stack for part in (config.embedding, config.llm) if part is not None]
    if any(stack.rope_scaling is not None and stack.rope_scaling.kind == "dynamic" for stack in parts):
        say(f"left out: dynamic NTK, which llama.cpp does not have; texts of up to {llm.max_length:,} tokens")
    if config.embedding is not None:
        say("left out: what makes input vectors of images; export --as llama writes it as vision.safetensors")
    elif config.teacher is not None:
        say("left out: the teacher, which reads images; this file reads text alone")


def _tokenizer_metadata(source, vocab_size, config, say):
    if not has_tokenizer(source):
        say("this model has no tokenizer: the file's tokens are their ids, and so are prompts")
        return gguf_metadata.ids_as_tokens(vocab_size)
    tokenizer = load_tokenizer(source)
    try:
        template = template_of(tokenizer, config.system_message)
        metadata = gguf_metadata.tokenizer_to_metadata(tokenizer, vocab_size, template)
    except UserError as error:
        say(f"left out: the tokenizer ({error}); the file's tokens are their ids, and so are prompts")
        return gguf_metadata.ids_as_tokens(vocab_size)
    say_if_blanks_change(tokenizer, "llama.cpp", say)
    return metadata


def write_gguf(
    path: pathlib.Path,
    arch: str,
    metadata: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Array]],
    dtype: str,
    factors: np.ndarray | None = None,
) -> None:
    """Writes a GGUF file, one tensor at a time.

    Args:
      sizes: {tensor name: shape}, the output dimension first.
      tensors: (tensor name, array), in the same order.
      dtype: of the matrices; vectors are float32.
      factors: of rotary frequencies (`gguf.ROPE_FACTORS`).
    Raises:
      UserError: the package `gguf` is missing, or a number exceeds float16.
    """
    package = gguf.package("writing")
    writer = package.GGUFWriter(path, arch)
    kinds = {True: package.GGMLQuantizationType[NAMES[dtype][0]], False: package.GGMLQuantizationType.F32}
    for key, value in ({"general.file_type": int(package.LlamaFileType[NAMES[dtype][1]])} | dict(metadata)).items():
        writer.add_key_value(key, value, _kind(package, value))
    if factors is not None:
        sizes = {gguf.ROPE_FACTORS: factors.shape, **sizes}
        tensors = itertools.chain([(gguf.ROPE_FACTORS, factors)], tensors)
    stored = {name: DTYPES[dtype if len(shape) > 1 else "float32"] for name, shape in sizes.items()}
    for name, shape in sizes.items():
        nbytes = int(np.prod(shape)) * stored[name].itemsize
        writer.add_tensor_info(name, shape, stored[name], nbytes, raw_dtype=kinds[len(shape) > 1])
    try:
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
            write()
        for (name, tensor), expected in zip(tensors, sizes, strict=True):
            assert (name, tensor.shape) == (expected, tuple(sizes[name]))
            writer.write_tensor_data(_cast(name, np.asarray(tensor), stored[name]))
    finally:
        writer.close()


def _kind(package, value):
    """The GGUF type of a value of the metadata; integers are unsigned, as llama.cpp wants them."""
    kinds = package.GGUFValueType
    return kinds.UINT32 if isinstance(value, int) and not isinstance(value, bool) else kinds.get_type(value)


def _cast(name, tensor, dtype):
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor.astype(dtype, copy=False))
    if dtype == np.float16:
        lost = np.count_nonzero(np.isinf(cast)) - np.count_nonzero(np.isinf(tensor))
        if lost:
            raise UserError(
                f"{lost} numbers of {name} exceed float16 (65,504); export with --dtype bfloat16 or float32"
            )
    return cast
