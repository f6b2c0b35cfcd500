"""Rules between the tensors of a public checkpoint and the leaves of our parameter trees.

A family is a list of `Rule`: which public tensor becomes which of our leaves, and how. The same list imports
(`load`) and exports (`to_public`). As every transform only moves numbers, it maps gradients as well.

Dimension letters: D width, N layers, K kv heads, G query heads of one kv head, C head dim, P patches, F output width.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Params
from hovle_jax.errors import UserError
from hovle_jax.formats.source import TensorSource

Array: TypeAlias = jax.Array | np.ndarray
DeferredLeaf: TypeAlias = tuple[tuple[int, ...], Callable[[], np.ndarray]]  # its shape, a function that reads it
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one public tensor is split into our leaves, and the exact inverse.

    Attributes:
      split: public array -> tuple of our arrays.
      join: our arrays, as arguments -> public array.
    """

    split: Callable[[Any], tuple[Any, ...]]
    join: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One public tensor, or one per layer.

    Attributes:
      public: its name; '{layer}' stands for the layer's number.
      ours: paths of the leaves that it becomes, keys joined with '/'.
      num_layers: None = a single tensor; N = the layers' tensors are stacked on axis 0 of our leaves.
      first_layer: the number of the first of these layers in the checkpoint.
    """

    public: str
    ours: tuple[str, ...]
    transform: Transform
    num_layers: int | None = None
    first_layer: int = 0

    def names(self) -> list[str]:
        """The public names, in the order of layers."""
        if self.num_layers is None:
            return [self.public]
        layers = range(self.first_layer, self.first_layer + self.num_layers)
        return [self.public.replace("{layer}", str(layer)) for layer in layers]


def rule(public: str, ours: str, transform: Transform, num_layers: int | None = None) -> Rule:
    """A Rule; `ours` is one path, or several separated by blanks."""
    return Rule(public, tuple(ours.split()), transform, num_layers)


def nested(rules: Iterable[Rule], *, ours: str, public: str = "") -> list[Rule]:
    """The rules of a component inside a larger checkpoint: prefixes for the public names and for our paths."""
    return [
        dataclasses.replace(r, public=public + r.public, ours=tuple(f"{ours}/{path}" for path in r.ours)) for r in rules
    ]


def check(rules: list[Rule], source: TensorSource, abstract: Params | None = None) -> None:
    """Compares the names and shapes of a checkpoint's tensors with what the rules and our parameters need.

    Args:
      source: no tensor of it is read.
      abstract: our parameters' shapes, where they are known.
    Raises:
      UserError: tensors are missing, unknown, or of a shape that the config does not allow; it names them.
    """
    rules = _present(rules)
    shapes, names = source.shapes, {n for r in rules for n in r.names()}
    _check_names(names, set(shapes), f"{source.file_of(None)} (the checkpoint)")
    wanted: dict[str, Any] = {} if abstract is None else flax.traverse_util.flatten_dict(abstract, sep="/")
    for r in rules:
        for name in r.names():
            tensor = jax.ShapeDtypeStruct(shapes[name], jnp.float32)
            pieces = _split(r, f"{source.file_of(name)}: {name}", tensor)
            for path, piece in zip(r.ours, pieces, strict=True):
                shape = wanted[path].shape[r.num_layers is not None :] if path in wanted else piece.shape
                if tuple(piece.shape) != tuple(shape):
                    raise UserError(
                        f"{source.file_of(name)}: {name} has shape {list(tensor.shape)}, which gives {path} of "
                        f"{list(piece.shape)}; the config needs {list(shape)}"
                    )


def load(rules: list[Rule], source: TensorSource, abstract: Params | None = None) -> Params:
    """Parameters from a source, one public tensor at a time.

    Args:
      abstract: our parameters' shapes with shardings: each leaf goes to its devices as soon as it is complete, so the
        host never holds more than one leaf. None: numpy arrays.
    Raises:
      UserError: see `check`. Values that are not finite are counted in a warning.
    """
    check(rules, source, abstract)
    targets: dict[str, Any] = {} if abstract is None else flax.traverse_util.flatten_dict(abstract, sep="/")
    leaves = {}
    for r in _present(rules):
        leaves |= {path: _place(leaf, targets.get(path)) for path, leaf in zip(r.ours, _read(r, source), strict=True)}
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def deferred(rules: list[Rule], source: TensorSource) -> dict[str, DeferredLeaf]:
    """{path: (shape, function that reads the leaf)}; nothing is read yet, and each function may be called once."""
    check(rules, source)
    leaves = {}
    for r in _present(rules):
        first = r.names()[0]
        shapes = [x.shape for x in _split(r, first, jax.ShapeDtypeStruct(source.shapes[first], jnp.float32))]
        waiting = {}  # leaves that were read with another one of the same tensor

        def read(path, r=r, waiting=waiting):
            if not waiting:
                waiting.update(zip(r.ours, _read(r, source), strict=True))
            return waiting.pop(path)

        for path, shape in zip(r.ours, shapes, strict=True):
            layers = () if r.num_layers is None else (r.num_layers,)
            leaves[path] = ((*layers, *shape), functools.partial(read, path))
    return leaves


def _present(rules):
    """A stack without layers has no tensors."""
    return [r for r in rules if r.num_layers != 0]


def _read(r: Rule, source: TensorSource) -> tuple[np.ndarray, ...]:
    """The leaves of one rule, layers stacked."""
    buffers: tuple[np.ndarray, ...] = ()
    for layer, name in enumerate(r.names()):
        tensor = source.read(name)
        wrong = tensor.size - np.count_nonzero(np.isfinite(tensor))
        if wrong:
            log.warning("%s: %s: %d of %d values are not finite", source.file_of(name), name, wrong, tensor.size)
        pieces = r.transform.split(tensor)
        if r.num_layers is None:
            return pieces
        buffers = buffers or tuple(_aligned((r.num_layers, *piece.shape), piece.dtype) for piece in pieces)
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer[layer] = piece
    return buffers


def _aligned(shape, dtype, alignment=64):
    """An uninitialised array, aligned as XLA wants it, so that a CPU device can use it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _place(leaf, target):
    if target is None:
        return leaf
    return jax.make_array_from_callback(leaf.shape, target.sharding, lambda index: leaf[index])


def to_public(rules: list[Rule], params: Params) -> dict[str, Array]:
    """A tree of parameters (or of their gradients) -> public tensors {name: array}. The inverse of `load`.

    Raises:
      UserError: leaves are missing or unknown; it names them.
    """
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    _check_names({path for r in _present(rules) for path in r.ours}, set(leaves), "the parameter tree")
    return dict(public_tensors(rules, leaves.__getitem__))


def public_shapes(rules: list[Rule], abstract: Params) -> dict[str, tuple[int, ...]]:
    """{public name: shape}, from the shapes of our parameters, in the order of `public_tensors`."""
    shapes = jax.eval_shape(lambda params: to_public(rules, params), abstract)  # whose keys come back sorted
    return {name: shapes[name].shape for r in rules for name in r.names()}


def public_tensors(rules: list[Rule], read: Callable[[str], Array]) -> Iterator[tuple[str, Array]]:
    """Iterates over (public name, array). `read(path)` gives a leaf, and is called once for each."""
    for r in _present(rules):
        leaves = [read(path) for path in r.ours]
        for layer, name in enumerate(r.names()):
            yield name, r.transform.join(*(leaf if r.num_layers is None else leaf[layer] for leaf in leaves))


def _check_names(expected, found, where):
    wrong = [
        f"{what} {_some(names)}"
        for what, names in (("lacks", expected - found), ("has unknown", found - expected))
        if names
    ]
    if wrong:
        raise UserError(f"{where} does not match its config: it {'; it '.join(wrong)}")


def _some(names, limit=5):
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _split(r, name, tensor):
    """Shapes of what a tensor becomes."""
    try:
        return jax.eval_shape(r.transform.split, tensor)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name} has shape {list(tensor.shape)}, which does not fit the config: {error}") from error


def _namespace(array):
    """numpy stays on the host; JAX arrays, tracers included, stay with JAX."""
    return jnp if isinstance(array, jax.Array) else np


# ---------------------------------------------------------------------------------------------------------------------
# Transforms. PyTorch's linear weights are [out, in], our kernels [in, out].

SAME = Transform(lambda x: (x,), lambda x: x)
LINEAR = Transform(lambda x: (x.T,), lambda x: x.T)
ROW = Transform(lambda x: (x[None],), lambda x: x[0])  # [D] <-> [1, D]
SCALAR = Transform(lambda x: (x.reshape(()),), lambda x: x.reshape(1))  # [1] <-> []
CONVOLUTION = Transform(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
CLASS_TOKEN = Transform(lambda x: (x.reshape(1, -1),), lambda x: x[None])  # [1, 1, D] <-> [1, D]


def padded(transform: Transform, rows: int, padded_rows: int) -> Transform:
    """`transform` of a public array of `rows` rows that is padded with zeros to `padded_rows` rows on our side."""
    if rows == padded_rows:
        return transform

    def split(x):
        if x.shape[0] != rows:
            raise ValueError(f"{rows} rows are needed")
        zeros = ((0, padded_rows - rows), *((0, 0) for _ in x.shape[1:]))
        return transform.split(_namespace(x).pad(x, zeros))

    return Transform(split, lambda *pieces: transform.join(*pieces)[:rows])


def _join_positions(first, rest):
    return _namespace(first).concatenate([first, rest])[None]


# [1, 1 + P, D] <-> row 0, the class token's, [1, D] and the patches' [P, D]
POSITIONS = Transform(lambda x: (x[0, :1], x[0, 1:]), _join_positions)


# The same without the axis in front: [1 + P, D].
POSITION_ROWS = Transform(lambda x: (x[:1], x[1:]), lambda first, rest: _join_positions(first, rest)[0])


def patch_kernel(patch_size: int, channels: int = 3) -> Transform:
    """Convolution [F, channels, p, p] <-> Dense kernel [p * p * channels, F], flattened as `patchify` flattens."""

    def split(x):
        return (x.transpose(2, 3, 1, 0).reshape(patch_size * patch_size * channels, -1),)

    def join(x):
        return x.reshape(patch_size, patch_size, channels, -1).transpose(3, 2, 0, 1)

    return Transform(split, join)


def packed_wqkv(num_heads: int, num_kv_heads: int, head_dim: int) -> Transform:
    """InternLM2's `wqkv` [K * (G + 2) * C, D] <-> query [D, K * G * C], key [D, K * C], value [D, K * C].

    The output dimension is (kv head, slot, head dim): the group's G queries, then its key, then its value. The same
    for a bias, without D.
    """
    groups = num_heads // num_kv_heads

    def split(x):
        rest = x.shape[1:]
        x = x.reshape(num_kv_heads, groups + 2, head_dim, *rest)
        return tuple(piece.reshape(-1, *rest).T for piece in (x[:, :groups], x[:, groups], x[:, groups + 1]))

    def join(*pieces):
        rest = pieces[0].shape[:-1]
        pieces = [piece.T.reshape(num_kv_heads, -1, head_dim, *rest) for piece in pieces]
        return _namespace(pieces[0]).concatenate(pieces, axis=1).reshape(-1, *rest)

    return Transform(split, join)


# Stacked [3 D, D] <-> three kernels [D, D]; the same for the biases [3 D].
STACKED_QKV = Transform(
    lambda x: tuple(piece.T for piece in x.reshape(3, -1, x.shape[1])),
    lambda *pieces: _namespace(pieces[0]).concatenate([piece.T for piece in pieces]),
)
STACKED_BIAS = Transform(
    lambda x: tuple(x.reshape(3, -1)),
    lambda *pieces: _namespace(pieces[0]).concatenate(pieces),
)
