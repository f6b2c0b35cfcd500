"""THE table of components: what a model or a run is made of, and how each becomes a module with parameters.

Parameters are a dict of components: {'embedding': ..., 'llm': ...}. A new one (a tower, an adapter, a reward head) is a
row here, with its sizes in `config.ModelConfig`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from hovle_jax.config import ExecutionConfig, ModelConfig
from hovle_jax.model import adapters
from hovle_jax.model.adapters import AdapterConfig, Adapters, Target
from hovle_jax.model.clip import CLIP
from hovle_jax.model.embedding import HolisticEmbedding
from hovle_jax.model.execution import Execution, OneDevice
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.streams import Stream
from hovle_jax.model.teacher import StudentHead, VisionTeacher
from hovle_jax.sharding.layout import Path, is_boxed

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # a key of caches, by identity
class Component:
    """One row.

    Attributes:
      module: (ModelConfig, Execution) -> Linen module.
      inputs: ModelConfig -> what the module can be called with, one row or tile of zeros.
      has_sizes: whether a model with this config has the component.
      handed_on: whether it is a part of a stage's result; the others are dropped with the stage.
      vocabulary: {path of a leaf: its axis of token ids}.
      unused: paths that public checkpoints have and nothing reads: never trained, decayed or changed.
      statistics: names of leaves that were counted, not learned: the same holds for them.
    """

    module: Callable[[Any, Execution], Any]
    inputs: Callable[[Any], tuple]
    has_sizes: Callable[[ModelConfig], bool]
    handed_on: bool = False
    vocabulary: dict[Path, int] = dataclasses.field(default_factory=dict)
    unused: tuple[Path, ...] = ()
    statistics: tuple[str, ...] = ()


def _token(images: int | None = None) -> Stream:
    """A row of one token; with so many visual tokens, which stand nowhere."""
    one = np.zeros((1, 1), np.int32)
    return Stream(one, one, one, None if images is None else np.zeros((1, images), np.int32))


def _llm_inputs(config: ModelConfig):
    return tuple(_token().fields().values())


def _embedding_inputs(config: ModelConfig):
    c = config.embedding
    batch = _token(c.tokens_per_tile).fields() | {"tiles": _tile(c.tile_size)[None]}
    if c.pixel_shuffle == "post":
        batch |= _token(c.stack_tokens_per_tile).fields(long=True) | {"long_text_positions": np.zeros((1, 1), np.int32)}
    return (batch,)


def _tile(size):
    return np.zeros((1, size, size, 3), np.uint8)


STATISTICS = ("mean", "variance", "batches")  # of a ResNet's batch norm
COMPONENTS = {
    "llm": Component(
        module=lambda config, execution: LanguageModel(config.llm, execution),
        inputs=_llm_inputs,
        has_sizes=lambda config: config.llm is not None,
        handed_on=True,
        vocabulary={("token_embedding", "embedding"): 0, ("head", "kernel"): 1},
    ),
    "embedding": Component(
        module=lambda config, execution: HolisticEmbedding(config.embedding, execution),
        inputs=_embedding_inputs,
        has_sizes=lambda config: config.embedding is not None,
        handed_on=True,
        vocabulary={("text_embedding", "embedding"): 0},
        unused=(("class_embedding",), ("class_position",)),
    ),
    "clip": Component(
        module=lambda config, execution: CLIP(config.clip, execution),
        inputs=lambda config: (_tile(config.clip.vision.image_size), np.zeros((1, 1), np.int32)),
        has_sizes=lambda config: config.clip is not None,
        handed_on=True,
        statistics=STATISTICS,
    ),
    "teacher": Component(
        module=lambda config, execution: VisionTeacher(config.teacher, execution),
        inputs=lambda config: (_tile(config.teacher.vision.image_size), (config.teacher.vision.grid // 2) ** 2),
        has_sizes=lambda config: config.teacher is not None,
        statistics=STATISTICS,
    ),
    # A student needs no head for a teacher that has a projector.
    "head": Component(
        module=lambda config, execution: StudentHead(4 * config.teacher.width, execution),
        inputs=lambda config: (np.zeros((1, 1, config.embedding.stack.width), np.float32),),
        has_sizes=lambda config: config.teacher is not None and config.teacher.projector == "linear",
    ),
    # In place of what it lies beside; merged into that, it is handed on.
    adapters.COMPONENT: Component(
        module=lambda config, execution: Adapters(adapter_targets(config), config.adapter),
        inputs=lambda config: (),
        has_sizes=lambda config: config.adapter.rank > 0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Models:
    """The modules of a model or a run; making one costs nothing until it is initialised. Hashable.

    Attributes:
      config: sizes, and a resolved execution (no 'auto').
      placement: where arrays lie.
    """

    config: ModelConfig
    placement: OneDevice = OneDevice()

    @property
    def execution(self) -> Execution:
        e = self.config.execution
        return Execution(e.dtype, e.attention, e.unroll_layers, e.remat, self.placement, e.int8)

    def __getitem__(self, component: str) -> Any:
        """The Linen module of a component."""
        return COMPONENTS[component].module(self.config, self.execution)

    @property
    def hovle(self) -> HoVLE:
        """The embedding and the LLM as one model, or the LLM alone."""
        return HoVLE(self.config.model, self.execution)


def logical_shapes(config: ModelConfig, component: str) -> Params:
    """Shapes of a component's parameters as Linen boxes, which carry their logical axes."""
    return _boxed_shapes(config, COMPONENTS[component])


@functools.lru_cache(maxsize=64)
def adapter_targets(config: ModelConfig) -> tuple[Target, ...]:
    """The kernels that get an adapter, of all components that the config has."""
    plain, found = dataclasses.replace(config, adapter=AdapterConfig()), []
    for name, row in COMPONENTS.items():
        if name == adapters.COMPONENT or not row.has_sizes(plain):
            continue
        flat: dict[Path, Any] = traverse_util.flatten_dict(logical_shapes(plain, name))
        for path, leaf in flat.items():
            if config.adapter.matches((name, *path)):
                found.append(Target((name, *path[:-1]), leaf.value.shape, leaf.names))
    return tuple(found)


@functools.lru_cache(maxsize=64)  # runs of one config in one process share it
def _boxed_shapes(config, row):
    module, inputs = _initial(config, row)
    return jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))


def shapes(config: ModelConfig, component: str) -> Params:
    """Shapes of a component's parameters."""
    return unboxed(logical_shapes(config, component))


def fresh(config: ModelConfig, component: str, seed: int, abstract: Params) -> Params:
    """Fresh values of a component, made on their shards; they depend on the seed and the component alone.

    Args:
      abstract: shapes with shardings of the parameters to make, all or some of the component's.
    """
    flat: dict[Path, Any] = traverse_util.flatten_dict(abstract)
    shardings = {path: leaf.sharding for path, leaf in flat.items()}
    key = jax.random.fold_in(jax.random.key(seed), list(COMPONENTS).index(component))
    return traverse_util.unflatten_dict(_initialiser(config, COMPONENTS[component], tuple(shardings.items()))(key))


@functools.lru_cache(maxsize=32)  # likewise
def _initialiser(config, row, shardings):
    """Compiled function of a key -> {path: values}."""
    module, inputs = _initial(config, row)

    def init(key):
        flat = traverse_util.flatten_dict(nn.meta.unbox(module.init(key, *inputs)["params"]))
        return {path: flat[path] for path, _ in shardings}

    return jax.jit(init, out_shardings=dict(shardings))


def _initial(config, row):
    """-> (module, inputs) to initialise: layers in a loop, so that they are compiled once instead of once a layer."""
    models = Models(dataclasses.replace(config, execution=ExecutionConfig()))
    return row.module(models.config, models.execution), row.inputs(config)


# -- trees of parameters


def select(params: Params, predicate: Callable[[Path], bool]) -> Params:
    """The part of a nested dict whose paths (tuples of keys) fulfil the predicate."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if predicate(path)})


def merge(first: Params, second: Params) -> Params:
    """One nested dict from two disjoint ones."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(first) | traverse_util.flatten_dict(second))


def unboxed(tree: Params) -> Params:
    """The plain tree of a boxed one (Linen's own unboxing would constrain what is not there yet)."""
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, tree, is_leaf=is_boxed)
