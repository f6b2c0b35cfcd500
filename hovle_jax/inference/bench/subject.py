"""The model that is measured: a finished one, or one of random weights, which is as fast."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.checkpoints import abstract_component
from hovle_jax.components import Models
from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.data.batch import Sample, no_tiles
from hovle_jax.data.processor import Processor
from hovle_jax.inference.bench.cases import Case, with_tile_size
from hovle_jax.inference.engine import Engine
from hovle_jax.inference.generate import Answerer, row_shape
from hovle_jax.inference.load import load_run
from hovle_jax.inference.reading import Reading
from hovle_jax.inference.slots import fused
from hovle_jax.model.hovle import HoVLE
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model with the weights that engines read.

    Attributes:
      params: as `slots.fused` makes them.
      tokenizer: of its answers' text, or `NoText`.
      parameters: how many there are.
      dtype: 'float32', 'bfloat16' or 'int8'.
    """

    hovle: HoVLE
    params: dict
    tokenizer: Any
    parameters: int
    dtype: str

    def answerer(self, case: Case) -> Answerer:
        """It, reading tiles of the case's size; its parameters are the engine's."""
        hovle = dataclasses.replace(self.hovle, config=with_tile_size(self.hovle.config, case.tile_size))
        return Answerer(hovle, {}, Processor(self.tokenizer))

    def engine(self, case: Case) -> Engine:
        """With just the room that the case's requests need."""
        length = prompt_tokens(self.hovle, case) + case.new_tokens
        return Engine(self.answerer(case), case.streams, length, tiles=int(case.tile_size > 0), params=self.params)


class NoText:
    """What an engine needs of a tokenizer, for answers that nobody reads."""

    stop_ids, clean_up = (), False

    def __init__(self, image_id: int):
        self.image_id = image_id

    def decode(self, ids: Any) -> str:
        """Nothing."""
        return ""


def load(folder: str | os.PathLike, dtype: str = "") -> Subject:
    """A finished model; `dtype` as that of `hovle_jax.load`."""
    int8 = dtype == "int8"
    loaded = load_run(folder, dtype="" if int8 else dtype)
    hovle, count = loaded.models.hovle, _count(loaded.params)
    params = fused(loaded.params, hovle, int8, consume=True)
    return Subject(hovle, params, loaded.tokenizer, count, dtype or hovle.execution.dtype)


def random(config: ModelConfig, dtype: str = "") -> Subject:
    """A model of a config's sizes; what it says means nothing."""
    int8 = dtype == "int8"
    placement = Placement(make_mesh(MeshConfig(), jax.local_devices()[:1]))
    execution = dataclasses.replace(config.execution, dtype=dtype if dtype and not int8 else "auto")
    config = dataclasses.replace(config, execution=execution.resolved(jax.default_backend()))
    hovle = Models(config, placement).hovle
    names = ("embedding", "llm") if config.embedding else ("llm",)
    abstract = {name: abstract_component(config, name, placement) for name in names}
    shapes = jax.eval_shape(functools.partial(fused, hovle=hovle, int8=int8), abstract)
    params = jax.tree_util.tree_map_with_path(_drawn, shapes)
    tokenizer = NoText(hovle.config.num_tokens - 1)
    return Subject(hovle, params, tokenizer, _count(abstract), dtype or hovle.execution.dtype)


def _drawn(path, leaf):
    """Numbers of a usual size."""
    name = jax.tree_util.keystr(path)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        values = np.arange(127)
    elif "norm" in name:
        values = np.ones(1)
    elif name.endswith(".scale"):  # of int8
        values = np.full(1, 1e-4)
    else:
        values = _block()
    return jnp.asarray(np.resize(values.astype(leaf.dtype), leaf.shape))


@functools.cache
def _block():
    return np.random.default_rng(0).normal(0, 0.02, 2**20)


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def prompt_tokens(hovle: HoVLE, case: Case) -> int:
    """Of each request, as the LLM reads them."""
    embedding = with_tile_size(hovle.config, case.tile_size).embedding
    return case.text_tokens + (embedding.tokens_per_tile if embedding and case.tile_size else 0)


def draw(answerer: Answerer, case: Case, seed: int) -> Sample:
    """A request that is like no other, so that nothing read before is used again: random pixels, then random ids."""
    rng, config = np.random.default_rng(seed), answerer.hovle.config
    ids, tiles, embedding = np.arange(config.num_tokens, dtype=np.int32), no_tiles(), config.embedding
    if embedding is not None:
        ids, tiles = np.delete(ids, answerer.tokenizer.image_id), no_tiles(embedding.tile_size)
    tokens = rng.choice(ids, case.text_tokens)
    if embedding is not None and case.tile_size:
        image = np.full(embedding.tokens_per_tile, answerer.tokenizer.image_id, np.int32)
        tokens = np.concatenate([image, tokens])
        tiles = rng.integers(0, 256, (1, *tiles.shape[1:]), np.uint8)
    return Sample(tokens, np.zeros(len(tokens), bool), tiles)


def read(answerer: Answerer, sample: Sample) -> Reading:
    """As an engine prepares it."""
    if answerer.hovle.config.embedding is None:
        return Reading.of_text(sample.tokens)
    return Reading.of(sample, row_shape(answerer, len(sample.tokens), len(sample.tiles)))
