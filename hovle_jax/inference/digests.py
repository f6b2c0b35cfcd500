"""Digests of what a model is, for what is made of it once and kept."""

import hashlib
import os
import pathlib

from hovle_jax.data.text.tokenizer import FILES
from hovle_jax.system import file_lists

TOKENIZER_FILES = (*FILES, "added_tokens.json")


def component_digest(folder: str | os.PathLike, component: str) -> str:
    """Of a component's files and of the config: from the list of digests that is written with them, or of themselves.

    Raises:
      UserError: that list is damaged.
    """
    model = pathlib.Path(folder) / "model"
    listed = file_lists.read_list(model)
    files = listed[0] if listed else file_lists.measured(model)
    own = sorted((name, sorted(facts.items())) for name, facts in files.items() if _is_of(name, component))
    return hashlib.sha256(repr(own).encode()).hexdigest()


def _is_of(name, component):
    return name == "config.json" or name.startswith(f"{component}/")


def tokenizer_digest(folder: str | os.PathLike) -> str:
    """Of the tokenizer's files in a model's folder."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        path = pathlib.Path(folder) / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
