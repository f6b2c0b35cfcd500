"""Where everything of a run lies, computed once before its first step."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from hovle_jax.sharding.placement import Placement
from hovle_jax.sharding.rules import ZERO, as_axes

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape and logical axes, and the specs of what belongs to it.

    Attributes:
      specs: (use, PartitionSpec) for each use of `rules.ZERO`.
      refused: rules that cannot apply to the parameter (see `rules.partition_spec`).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    specs: tuple[tuple[str, PartitionSpec], ...]
    refused: tuple[tuple, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[str | None, ...], placement: Placement) -> "Leaf":
        found = {use: placement.spec_and_refused(axes, shape, use) for use in ZERO}
        specs = tuple((use, spec) for use, (spec, _) in found.items())
        return cls(tuple(shape), tuple(axes), specs, tuple(found["parameters"][1]))

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def spec(self, use: str = "parameters") -> PartitionSpec:
        return dict(self.specs)[use]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Hashable, so that a step can be compiled for it.

    Attributes:
      leaves: (path, Leaf) of every parameter that the run holds, in the order of the tree.
    """

    placement: Placement
    leaves: tuple[tuple[Path, Leaf], ...]

    @classmethod
    def of(cls, placement: Placement, boxed: dict) -> "Layout":
        """From a tree of boxed shapes (see `components.logical_shapes`)."""
        found = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed)
        leaves = []
        for path, leaf in found:
            shape = leaf.value.shape if is_boxed(leaf) else leaf.shape
            names = leaf.names if is_boxed(leaf) else (None,) * len(shape)
            leaves.append((keys_of(path), Leaf.of(shape, names, placement)))
        return cls(placement, tuple(leaves))

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self):
        return hash((self.placement, self.leaves))  # of hundreds of leaves, asked for at each step

    @functools.cached_property
    def table(self) -> dict[Path, Leaf]:
        return dict(self.leaves)

    def specs(self, tree: Any, use: str = "parameters") -> Any:
        """PartitionSpecs for a tree whose paths end as the parameters' do; of what belongs to none: whole."""

        def one(path, _):
            leaf = self.table.get(keys_of(path))
            return leaf.spec(use) if leaf else PartitionSpec()

        return jax.tree_util.tree_map_with_path(one, tree)

    def shardings(self, tree: Any, use: str = "parameters") -> Any:
        """NamedShardings, as `specs`."""
        is_spec = lambda spec: isinstance(spec, PartitionSpec)
        return jax.tree.map(self.placement.sharding, self.specs(tree, use), is_leaf=is_spec)

    def abstract(self, shapes: Any, use: str = "parameters") -> Any:
        """Shapes with their shardings."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.shardings(shapes, use),
        )

    def constrain(self, tree: Any, use: str = "parameters") -> Any:
        """Inside a jitted function: arrays laid out as the table says; as they are on one device."""
        if self.placement.is_one_device:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(tree, use))

    def is_sharded_by(self, path: Path, axis: str) -> bool:
        """Whether a mesh axis shards a parameter."""
        return any(axis in as_axes(axes) for axes in self.table[path].spec())


def is_boxed(leaf: Any) -> bool:
    """Whether a leaf carries logical axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def keys_of(path: Iterable) -> Path:
    """The names on a jax path of dicts, as of a parameter; other steps (a box's, a moment's) are left out."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
