"""From a run's folder to a model that answers."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.data.text.fit import check_fit
from hovle_jax.data.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Answerer
from hovle_jax.model.config import ExecutionConfig
from hovle_jax.training.checkpoint import load_component, load_model_config
from hovle_jax.training.loop import resolve_execution
from hovle_jax.training.sharding import make_mesh
from hovle_jax.training.stages import Models
from hovle_jax.training.state import abstract_component


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A finished model: its config, modules, parameters by component, and tokenizer."""

    config: ModelConfig
    models: Models
    params: dict
    tokenizer: Tokenizer

    @property
    def answerer(self):
        return Answerer(self.models.hovle, self.params, self.tokenizer, self.config.system_message)


def load_run(folder, components=None):
    """Loads components ('embedding', 'llm', 'clip') of a finished run or an import onto this machine's devices.

    Args:
      components: None = those that answer: the LLM, and the embedding where the model has one.
    Raises:
      UserError: no such folder, not finished, without these components or a tokenizer, or with another model's.
    """
    folder = pathlib.Path(folder)
    config = load_model_config(folder)
    if components is None:
        components = ("embedding", "llm") if config.embedding else ("llm",)
    missing = [c for c in components if not (folder / "model" / c).is_dir()]
    if missing:
        raise UserError(
            f"{folder} holds no {' and '.join(missing)}: give the folder of a finished run that does, as runs/instruct "
            "for answers or runs/contrast for zero-shot"
        )
    tokenizer = own_tokenizer(folder, config, components)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    models = Models(config, resolve_execution(config.execution, mesh.devices.flat[0].platform))
    params = {
        c: load_component(folder, c, abstract_component(models, c, example_batch(config, c), mesh)) for c in components
    }
    return Loaded(config, models, params, tokenizer)


def own_tokenizer(folder, config: ModelConfig, components):
    """The tokenizer of a model's folder. Raises UserError where there is none, or it has ids that the model lacks."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer, so it cannot answer: copy the model's tokenizer.model or tokenizer.json "
            "there, or import it again from a folder that has one"
        )
    tokenizer = load_tokenizer(folder)
    known = config.clip.text.vocab_size if "clip" in components else config.model.num_tokens
    is_llm_alone = "clip" not in components and config.embedding is None
    check_fit(tokenizer, known, f"the tokenizer in {folder}", sees_images=not is_llm_alone)
    return tokenizer


def abstract_model(config: ModelConfig, component, mesh):
    """Shapes with shardings of a component's parameters."""
    models = Models(config, ExecutionConfig())  # which changes no parameter
    return abstract_component(models, component, example_batch(config, component), mesh)


def example_batch(config: ModelConfig, component):
    """Shapes of a one-row batch, enough to initialise a component."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    names = ("tokens", "positions", "segment_ids")
    batch = {prefix + name: tokens for prefix in ("", "long_") for name in names} | {"long_text_positions": tokens}
    if component == "llm":
        return batch
    embedding = config.embedding
    size = embedding.tile_size if component == "embedding" else getattr(config, component).vision.image_size
    batch["tiles"] = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8)
    if component == "embedding":
        for prefix, count in (("", embedding.tokens_per_tile), ("long_", embedding.stack_tokens_per_tile)):
            batch[f"{prefix}image_positions"] = jax.ShapeDtypeStruct((1, count), jnp.int32)
    return batch
