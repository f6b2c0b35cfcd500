"""Exports a base HoVLE as a plain Llama folder, and beside it what makes input vectors of image tiles.

DST/config.json, model*.safetensors and their index, the tokenizer: a Llama, which needs no code of HoVLE's.
DST/vision.safetensors, vision.json: patch embedding, positions, pixel shuffle projection, and their sizes.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from hovle_jax.components import select, shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.exporting import (
    DTYPES,
    SHARD_BYTES,
    leaf_reader,
    own_dtype,
    stored_config,
    with_dtype,
    write_tensors,
)
from hovle_jax.conversion.importing import PUBLIC
from hovle_jax.conversion.tokenizer_files import write_tokenizer
from hovle_jax.data.text.conversation import DEFAULT_SYSTEM
from hovle_jax.data.text.tokenizer import IMAGE_TOKEN, SentencePieceTokenizer, Tokenizer, has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import llama, one_llama
from hovle_jax.formats.fields import read_object
from hovle_jax.formats.mapping import Rule, public_shapes, public_tensors
from hovle_jax.formats.tiling import tiling_to_json
from hovle_jax.model.config import HoVLEConfig
from hovle_jax.system.files import whole_folder

SPACED = "a  b\n\n c"  # what a tokenizer that normalises would change


def export_as_llama(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], object] = print,
) -> None:
    """Writes the HoVLE of a finished run or an import as one Llama; `folder` appears when it is complete.

    Parameters are read and written leaf by leaf, as by `export_model`, which says what the arguments are.

    Raises:
      UserError: there is no finished HoVLE, it is not one decoder, the folder exists, or the disk is full.
    """
    source = pathlib.Path(source)
    config = stored_config(source)
    if config.llm is None:
        raise UserError(f"{source} holds no LLM: export --as llama takes a HoVLE, an embedding with its LLM")
    both = HoVLEConfig(config.embedding, config.llm)
    merged = one_llama.llm_config(both)
    assert config.embedding is not None
    if config.embedding.stack.rope_scaling != config.llm.stack.rope_scaling:
        say(f"left out: dynamic NTK, which only one of the two stacks has; texts of up to {merged.max_length:,} tokens")
    dtype = dtype or own_dtype(source)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    public = llama.config_to_json(merged) | _ends(tokenizer) | {"torch_dtype": dtype}
    vision = one_llama.vision_to_json(config.embedding, _image_id(source, tokenizer)) | tiling_to_json(config)
    with whole_folder(folder) as partial:
        # The index keeps loaders that take every .safetensors file of a folder away from vision.safetensors.
        _write(source, config, one_llama.rules(both), partial, dtype, shard_bytes, say, has_index=True)
        rules = one_llama.vision_rules(config.embedding)
        _write(source, config, rules, partial, dtype, 2**62, say, stem="vision")
        if tokenizer is not None:
            _write_tokenizer(tokenizer, config.system_message, partial, say)
        _write_json(partial / "config.json", with_dtype(public, dtype))
        _write_json(partial / "vision.json", vision | {"system_message": config.system_message})


def _write(source, config: ModelConfig, rules: list[Rule], folder, dtype, shard_bytes, say, **options):
    """Writes the tensors of some rules; of the components' leaves, these alone are read."""
    wanted = {tuple(path.split("/")) for r in rules for path in r.ours}
    whole = {component: shapes(config, component) for component in sorted({path[0] for path in wanted})}
    abstract = select(whole, lambda path: path in wanted)
    tensors = public_tensors(rules, leaf_reader(source, abstract))
    write_tensors(folder, public_shapes(rules, abstract), tensors, DTYPES[dtype], shard_bytes, say, **options)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _ends(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of config.json; without a tokenizer a Llama's defaults, which are also InternLM2's."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}


def _image_id(source, tokenizer):
    """The id of <IMG_CONTEXT>: the tokenizer's, or that of the config that was imported; None = unknown."""
    if tokenizer is not None:
        return tokenizer.specials.get(IMAGE_TOKEN)
    path = source / PUBLIC / "config.json"
    public = read_object(path) if path.is_file() else {}
    return (public.get("embedding_config") or {}).get("img_context_token_id")


def _write_tokenizer(tokenizer, system, folder, say):
    """The tokenizer's files."""
    say_if_blanks_change(tokenizer, "transformers", say)
    tokenizer.chat_template = template_of(tokenizer, system)
    write_tokenizer(tokenizer, folder)


def say_if_blanks_change(tokenizer: Tokenizer, engine: str, say: Callable[[str], object]) -> None:
    """Says so where a SentencePiece model normalises blanks, which other engines do not."""
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.decode(tokenizer.encode(SPACED)) != SPACED:
        say(f"this tokenizer changes blanks or line breaks; {engine} does not, so such texts have other ids there")


def template_of(tokenizer: Tokenizer, system: str) -> str:
    """A tokenizer's chat template in Jinja; without one the built-in one, which a plain Llama cannot know.

    Args:
      system: the system message of a chat without one; '' = the default.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return internlm2_template(system or DEFAULT_SYSTEM, begins=tokenizer.bos is not None)


def internlm2_template(system: str, begins: bool) -> str:
    """InternLM2's chat template (`conversation.internlm2_spans`) as Jinja.

    Args:
      system: the system message of a chat without one.
      begins: whether the tokenizer has a token that everything begins with.
    """
    begin = "{{ bos_token }}" if begins else ""
    return begin + (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n' + " + json.dumps(system, ensure_ascii=False) + " + '<|im_end|>' }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
