"""Imports a public checkpoint into a folder that the other commands read like a finished run's."""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import numpy as np

from hovle_jax.checkpoints import Deferred, save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.companions import copy_companions
from hovle_jax.conversion.tokenizer_files import read_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import clips, llms
from hovle_jax.formats.families import Checkpoint, local_path, open_checkpoint
from hovle_jax.formats.tiling import tiling_from_json
from hovle_jax.system.files import whole_folder

TAKEN = {"hovle": ("embedding", "llm"), "llm": ("llm",), "teacher": ("teacher",)}  # --as: components
PUBLIC = "public"  # in an import's folder: the checkpoint's config.json and other files, for an export
NOTE = "import.json"  # where an import came from, and the type of its tensors
log = logging.getLogger(__name__)


def import_checkpoint(
    source: str | os.PathLike, folder: str | os.PathLike, kind: str | None = None, say: Callable[[str], object] = print
) -> None:
    """Reads a public checkpoint (see `open_checkpoint`) into `folder`/model, component by component.

    Tensors are read and written one after another; the folder appears when it is complete.

    Args:
      source: a folder, a .gguf file or a hub id (hf:ORG/NAME[@REVISION]).
      kind: 'hovle', 'llm' or 'teacher': what to import; None = everything in the checkpoint.
    Raises:
      UserError: the checkpoint is broken, not supported or has no such component; its tokenizer is broken or belongs to
        another model; or the folder cannot be written.
    """
    name, source = str(source), local_path(source)
    checkpoint = open_checkpoint(source)
    configs = checkpoint.components()
    components = tuple(configs) if kind is None else TAKEN[kind]
    missing = [component for component in components if component not in configs]
    if missing:
        raise UserError(f"{source} has no {' and '.join(missing)}; it has {' and '.join(configs)}")
    config = ModelConfig(
        **{component: configs[component] for component in components},
        system_message=checkpoint.public_config.get("system_message") or "",  # only in our own exports
        **tiling_from_json(checkpoint.public_config),
    )
    checkpoint.check({component: shapes(config, component) for component in components})

    def tree(component):
        leaves = {
            path: Deferred(shape, np.dtype(np.float32), read)
            for path, (shape, read) in checkpoint.deferred_component(component).items()
        }
        say(f"{component}: {sum(leaf.size for leaf in leaves.values()):,} parameters")
        return flax.traverse_util.unflatten_dict(leaves, sep="/")

    reads_text = {"llm", "clip"} & set(components)
    tokenizer, reason = read_tokenizer(source, checkpoint) if reads_text else (None, "")
    if tokenizer is not None and config.clip is not None:
        config = dataclasses.replace(config, clip=_with_ids(config.clip, tokenizer))
    with whole_folder(folder) as partial:
        if tokenizer is not None:
            tokenizer.save(partial)
        if source.is_dir():
            name_of_config = clips.layout_of(checkpoint.config).config_file if "clip" in configs else "config.json"
            copy_public_files(source, public_config(checkpoint, kind), partial / PUBLIC, say, name_of_config)
        dtype = getattr(checkpoint.source, "dtype", "float32")
        (partial / NOTE).write_text(json.dumps({"source": name, "dtype": dtype}) + "\n")
        save_model(partial, config, {component: lambda c=component: tree(c) for component in components})
    if reason:
        log.warning("%s has no tokenizer, so it cannot answer (%s)", folder, reason)


def _with_ids(config, tokenizer):
    """A CLIP's config with the ids of its tokenizer, where they are not what a text is read by."""
    changed: dict[str, Any] = {} if tokenizer.pad is None else {"pad_id": tokenizer.pad}
    if config.text.pooling not in ("end", "highest"):
        changed["end_id"] = tokenizer.eos
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changed))


def public_config(checkpoint: Checkpoint, kind: str | None) -> dict[str, Any]:
    """Of the checkpoint's config.json what describes the imported components, unchanged."""
    whole = checkpoint.public_config
    if kind == "llm":
        return llms.with_model_type(whole.get("llm_config", whole))
    if kind == "teacher":
        return {"model_type": "intern_vit_6b"} | whole.get("vision_config", whole)
    return whole


def copy_public_files(
    source: pathlib.Path,
    config: dict[str, Any],
    folder: pathlib.Path,
    say: Callable[[str], object],
    config_file: str = "config.json",
) -> None:
    """Writes `config` and copies the files beside the weights into `folder`; names those that are left out."""
    folder.mkdir()
    (folder / config_file).write_text(json.dumps(config, indent=2) + "\n")
    left_out = copy_companions(source, folder)
    if left_out:
        say(f"left out: {', '.join(left_out)}")
