"""Small HoVLEs that are one Llama, and what docs/checkpoints.md says of their export."""

import dataclasses
import pathlib
import re

import jax

from hovle_jax.checkpoints import save_model
from hovle_jax.config import ModelConfig
from tests import micro
from tests.public_models import random_params


def hovle(variant="pre", layers=(2, 2), stack=None, embedding=None, llm=None, **of_both):
    """A micro HoVLE; `stack` changes both stacks, `of_both` the embedding and the LLM."""
    base = micro.model_config(variant)
    stacks = [dataclasses.replace(base.llm.stack, num_layers=n, **(stack or {})) for n in layers]
    return ModelConfig(
        embedding=dataclasses.replace(base.embedding, stack=stacks[0], **of_both, **(embedding or {})),
        llm=dataclasses.replace(base.llm, stack=stacks[1], **of_both, **(llm or {})),
    )


def with_rope(config, embedding, llm):
    scaled = lambda part, rope: dataclasses.replace(part, stack=dataclasses.replace(part.stack, rope_scaling=rope))
    return dataclasses.replace(config, embedding=scaled(config.embedding, embedding), llm=scaled(config.llm, llm))


def made(folder, config, tokenizer=None):
    """A model folder of random weights that give logits of a few units -> {component: parameters}."""
    params = {}
    for component in [name for name in ("embedding", "llm") if getattr(config, name)]:

        def scaled(path, x):
            name = path[-1].key
            return x * 0.1 + 1 if name == "scale" else x / (x.shape[-2] ** 0.5 if name == "kernel" else 5)

        params[component] = jax.tree_util.tree_map_with_path(scaled, random_params(config, component))
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save(folder)
    save_model(folder, config, {component: lambda c=component: params[c] for component in params})
    return params


def quiet(_):
    pass


def documented(number, names=None):
    """The names that a Python block of docs/checkpoints.md defines."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    names = {} if names is None else names
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number], names)
    return names
