"""A public checkpoint becomes a folder that the other commands read, as a finished run's."""

import json
import logging

import flax.traverse_util
import numpy as np

from hovle_jax.checkpoints import Deferred, save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.companions import copy_companions
from hovle_jax.conversion.tokenizer_files import read_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import llms
from hovle_jax.formats.families import local, open_checkpoint
from hovle_jax.formats.tiling import tiling_from_json
from hovle_jax.system.files import whole_folder

WANTED = {"hovle": ("embedding", "llm"), "llm": ("llm",), "teacher": ("teacher",)}
PUBLIC = "public"  # in an import's folder: the checkpoint's config.json and what lies beside it, for an export
NOTE = "import.json"  # where an import came from, and the type that held its tensors
log = logging.getLogger(__name__)


def import_checkpoint(source, folder, kind=None, say=print):
    """Reads a public checkpoint (see `open_checkpoint`) into `folder`/model, component by component.

    Tensors go from file to file, one after another; the folder appears when it is whole.

    Args:
      source: a folder, a .gguf file or a hub id.
      kind: 'hovle', 'llm' or 'teacher': the part to take; None = everything that the checkpoint has.
    Raises:
      UserError: the checkpoint is broken or not supported, has no such part, its tokenizer is broken or another
        model's, or the folder cannot be written.
    """
    name, source = str(source), local(source)
    checkpoint = open_checkpoint(source)
    configs = checkpoint.components()
    components = tuple(configs) if kind is None else WANTED[kind]
    missing = [component for component in components if component not in configs]
    if missing:
        raise UserError(f"{source} has no {' and '.join(missing)}; it holds {' and '.join(configs)}")
    config = ModelConfig(
        **{component: configs[component] for component in components},
        system_message=checkpoint.public_config.get("system_message") or "",  # our own exports have it
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

    tokenizer, reason = read_tokenizer(source, checkpoint) if "llm" in components else (None, "")
    with whole_folder(folder) as partial:
        if tokenizer is not None:
            tokenizer.save(partial)
        if source.is_dir():
            copy_public_files(source, public_config(checkpoint, kind), partial / PUBLIC, say)
        dtype = getattr(checkpoint.source, "dtype", "float32")
        (partial / NOTE).write_text(json.dumps({"source": name, "dtype": dtype}) + "\n")
        save_model(partial, config, {component: lambda c=component: tree(c) for component in components})
    if reason:
        log.warning("%s has no tokenizer, and so no answers (%s)", folder, reason)


def public_config(checkpoint, kind):
    """The part of the checkpoint's config.json that describes the part taken, as it came."""
    whole = checkpoint.public_config
    if kind == "llm":
        return llms.named(whole.get("llm_config", whole))
    if kind == "teacher":
        return {"model_type": "intern_vit_6b"} | whole.get("vision_config", whole)
    return whole


def copy_public_files(source, config, folder, say):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    left_out = copy_companions(source, folder)
    if left_out:
        say(f"left out: {', '.join(left_out)}")
