"""From a run's folder to a model that answers."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

from hovle_jax.checkpoints import abstract_component, load_component, load_model_config
from hovle_jax.components import Models
from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.data.processor import Processor
from hovle_jax.data.text.fit import check_fit
from hovle_jax.data.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Answerer
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A finished model: its config, modules, parameters by component, and tokenizer."""

    config: ModelConfig
    models: Models
    params: dict
    tokenizer: Tokenizer

    @property
    def answerer(self) -> Answerer:
        return Answerer(self.models.hovle, self.params, Processor.of(self.config, self.tokenizer))

    def with_max_tiles(self, tiles: int | None) -> "Loaded":
        """The same with another limit to the tiles of an image; None changes nothing."""
        return dataclasses.replace(self, config=self.config.with_max_tiles(tiles))


@dataclasses.dataclass(frozen=True)
class Found:
    """A finished model whose parameters have not been read yet."""

    folder: pathlib.Path
    components: tuple[str, ...]
    models: Models
    placement: Placement
    tokenizer: Tokenizer

    def read(self) -> Loaded:
        """Reads the parameters onto this machine's devices, whole on each."""
        config = self.models.config
        params = {
            c: load_component(self.folder, c, abstract_component(config, c, self.placement)) for c in self.components
        }
        return Loaded(config, self.models, params, self.tokenizer)


def load_run(folder: str | os.PathLike, components: Sequence[str] | None = None, dtype: str = "") -> Loaded:
    """Loads components ('embedding', 'llm', 'clip') of a finished run or an import onto this machine's devices.

    Arguments and errors: those of `find_run`.
    """
    return find_run(folder, components, dtype).read()


def find_run(folder: str | os.PathLike, components: Sequence[str] | None = None, dtype: str = "") -> Found:
    """The same, of which only the parameters have still to be read.

    Args:
      components: None = those that answer: the LLM, and the embedding where the model has one.
      dtype: in place of the model's own compute type: 'float32' or 'bfloat16'.
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
    placement = Placement(make_mesh(MeshConfig(), jax.local_devices()))
    platform = placement.mesh.devices.flat[0].platform
    execution = dataclasses.replace(config.execution, dtype=dtype or config.execution.dtype)
    config = dataclasses.replace(config, execution=execution.resolved(platform))
    return Found(folder, tuple(components), Models(config, placement), placement, tokenizer)


def own_tokenizer(folder: str | os.PathLike, config: ModelConfig, components: Sequence[str]) -> Tokenizer:
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
