"""From a run's folder to a model that answers."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from hovle_jax.config import MeshConfig, RunConfig
from hovle_jax.data.text import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Answerer
from hovle_jax.training.checkpoint import load_component, load_config
from hovle_jax.training.loop import resolve_execution
from hovle_jax.training.sharding import make_mesh
from hovle_jax.training.stages import Models
from hovle_jax.training.state import abstract_component


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A finished run's model: its config, modules, parameters by component, and tokenizer."""

    config: RunConfig
    models: Models
    params: dict
    tokenizer: Tokenizer

    @property
    def answerer(self):
        return Answerer(self.models.hovle, self.params, self.tokenizer, self.config.data.system_message)


def load_run(folder, components):
    """Loads components ('embedding', 'llm', 'clip') of a finished run onto this machine's devices.

    Raises:
      UserError: no such run, not finished, or a stage that does not make these components.
    """
    folder = pathlib.Path(folder)
    config = load_config(folder)
    missing = [c for c in components if not (folder / "model" / c).is_dir()]
    if missing:
        raise UserError(
            f"{folder} (stage {config.stage}) holds no finished {' and '.join(missing)}: "
            "give the folder of a finished run that does, as runs/instruct for answers or runs/contrast for zero-shot"
        )
    mesh = make_mesh(MeshConfig())
    execution = resolve_execution(config.execution, mesh.devices.flat[0].platform)
    models = Models(config, dataclasses.replace(execution, remat="none"))
    params = {
        c: load_component(folder, c, abstract_component(models, c, example_batch(config), mesh)) for c in components
    }
    return Loaded(config, models, params, Tokenizer.load(folder / "tokenizer.model"))


def example_batch(config: RunConfig):
    """Shapes of a one-row batch, enough to initialise any component."""
    embedding = config.model.embedding
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    names = ("tokens", "positions", "segment_ids")
    return {
        **{prefix + name: tokens for prefix in ("", "long_") for name in names},
        "long_text_positions": tokens,
        "tiles": jax.ShapeDtypeStruct((1, 1, embedding.image_size, embedding.image_size, 3), jnp.uint8),
        "image_positions": jax.ShapeDtypeStruct((1, embedding.tokens_per_tile), jnp.int32),
        "long_image_positions": jax.ShapeDtypeStruct((1, embedding.stack_tokens_per_tile), jnp.int32),
    }
