"""A public checkpoint becomes a folder that the other commands read, as a finished run's."""

import json
import pathlib
import shutil

import jax

from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf
from hovle_jax.formats.families import local, open_checkpoint
from hovle_jax.training.checkpoint import is_finished, open_run_folder, save_model
from hovle_jax.training.load import CHAT_TEMPLATE, abstract_model
from hovle_jax.training.sharding import make_mesh

WANTED = {"hovle": ("embedding", "llm"), "llm": ("llm",), "teacher": ("teacher",)}
PUBLIC_CONFIG = "public_config.json"  # an import's own config.json, for its export
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json", CHAT_TEMPLATE,
)  # fmt: skip


def import_checkpoint(source, folder, kind=None, say=print):
    """Reads a public checkpoint (see `open_checkpoint`) into `folder`/model, component by component.

    Args:
      source: a folder, a .gguf file or a hub id.
      kind: 'hovle', 'llm' or 'teacher': the part to take; None = everything that the checkpoint has.
    Raises:
      UserError: the checkpoint is broken or not supported, has no such part, or the folder holds a model already.
    """
    source, folder = local(source), pathlib.Path(folder)
    checkpoint = open_checkpoint(source)
    configs = checkpoint.components()
    components = tuple(configs) if kind is None else WANTED[kind]
    missing = [component for component in components if component not in configs]
    if missing:
        raise UserError(f"{source} has no {' and '.join(missing)}; it holds {' and '.join(configs)}")
    config = ModelConfig(**{component: configs[component] for component in components})
    mesh = make_mesh(MeshConfig())
    abstract = {component: abstract_model(config, component, mesh) for component in components}
    checkpoint.check(abstract)
    if is_finished(folder):
        raise UserError(f"{folder} holds a model already; choose another folder, or remove that one")
    folder = open_run_folder(folder)

    def read(component):
        say(f"{component}: {sum(leaf.size for leaf in jax.tree.leaves(abstract[component])):,} parameters")
        return checkpoint.load_component(component, abstract[component])

    import_text(source, checkpoint, folder, say)
    if source.is_dir():
        (folder / PUBLIC_CONFIG).write_text(json.dumps(checkpoint.public_config, indent=2) + "\n")
    save_model(folder, config, {component: lambda c=component: read(c) for component in components})


def import_text(source, checkpoint, folder, say):
    """The tokenizer and the chat template, as far as the checkpoint has them."""
    try:
        tokenizer, template = (text_from_folder if source.is_dir() else text_from_gguf)(source, checkpoint)
    except UserError as error:
        say(f"no tokenizer: {error}")
        return
    if source.is_dir():  # an export gives them back
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if tokenizer is not None:
        tokenizer.save(folder)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template)


def text_from_gguf(_, checkpoint):
    """-> (tokenizer, template or None) from the file's metadata."""
    metadata = checkpoint.public_config
    return gguf.tokenizer_from_metadata(metadata), metadata.get("tokenizer.chat_template")


def text_from_folder(folder, checkpoint):
    """-> (tokenizer or None, template or None) of a folder in Hugging Face layout."""

    def read(name):
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else {}

    settings, generation = read("tokenizer_config.json"), read("generation_config.json")
    decoder = settings.get("added_tokens_decoder") or {}
    added = {token["content"]: int(i) for i, token in decoder.items() if token.get("special")}
    added |= {token: i for token, i in read("added_tokens.json").items() if token not in added}
    content = lambda token: token["content"] if isinstance(token, dict) else token
    if (folder / "tokenizer.model").is_file():
        added = {token: i for token, i in added.items() if token not in ("<s>", "</s>", "<unk>")}
        tokenizer = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), added or None)
    elif (folder / "tokenizer.json").is_file():
        ends = generation.get("eos_token_id", checkpoint.public_config.get("eos_token_id"))
        ends = ends if isinstance(ends, list) else [ends]
        names = {i: token for token, i in added.items()}
        stops = {names[i] for i in ends if i in names} | {content(settings.get("eos_token"))}
        bos = content(settings.get("bos_token")) if settings.get("add_bos_token") else None
        text = (folder / "tokenizer.json").read_text()
        tokenizer = HuggingFaceTokenizer(text, bos, sorted(stops - {None}))
    else:
        tokenizer = None
    if checkpoint.kind != "llm":
        return tokenizer, None  # InternVL's and HoVLE's template is our own
    file = folder / CHAT_TEMPLATE
    template = file.read_text() if file.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return tokenizer, template
