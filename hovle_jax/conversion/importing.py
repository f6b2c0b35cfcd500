"""A public checkpoint becomes a folder that the other commands read, as a finished run's."""

import json
import shutil

import flax.traverse_util
import numpy as np

from hovle_jax.checkpoints import Deferred, save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.tokenizer_files import TOKENIZER_FILES, read_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import llms
from hovle_jax.formats.families import local, open_checkpoint
from hovle_jax.formats.tiling import tiling_from_json
from hovle_jax.system.files import whole_folder

WANTED = {"hovle": ("embedding", "llm"), "llm": ("llm",), "teacher": ("teacher",)}
PUBLIC = "public"  # in an import's folder: the checkpoint's config.json and tokenizer files as they came, for an export


def import_checkpoint(source, folder, kind=None, say=print):
    """Reads a public checkpoint (see `open_checkpoint`) into `folder`/model, component by component.

    Tensors go from file to file, one after another; the folder appears when it is whole.

    Args:
      source: a folder, a .gguf file or a hub id.
      kind: 'hovle', 'llm' or 'teacher': the part to take; None = everything that the checkpoint has.
    Raises:
      UserError: the checkpoint is broken or not supported, has no such part, or the folder cannot be written.
    """
    source = local(source)
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

    with whole_folder(folder) as partial:
        import_text(source, checkpoint, partial, say)
        if source.is_dir():
            copy_public_files(source, public_config(checkpoint, kind), partial / PUBLIC)
        save_model(partial, config, {component: lambda c=component: tree(c) for component in components})


def import_text(source, checkpoint, folder, say):
    """The tokenizer and the chat template, as far as the checkpoint has them."""
    try:
        tokenizer = read_tokenizer(source, checkpoint)
    except UserError as error:
        say(f"no tokenizer: {error}")
        return
    if tokenizer is not None:
        tokenizer.save(folder)


def public_config(checkpoint, kind):
    """The part of the checkpoint's config.json that describes the part taken, as it came."""
    whole = checkpoint.public_config
    if kind == "llm":
        return llms.named(whole.get("llm_config", whole))
    return whole.get("vision_config", whole) if kind == "teacher" else whole


def copy_public_files(source, config, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
