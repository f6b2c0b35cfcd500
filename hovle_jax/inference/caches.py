"""Keys and values of one layer for every slot, in the compute type, bfloat16 or int8, and attention over them.

Dimension letters: B slots, T tokens of a chunk, S capacity, H heads, K kv heads, G = H / K, C head dim.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hovle_jax.inference.products import product
from hovle_jax.inference.weights import INT8
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution


@flax.struct.dataclass
class One:
    """A chunk of one request: where its keys go.

    Attributes:
      slot, start: int32 scalars; what lies before `start` in the slot has been read before.
      reach: static; how much of the caches is looked at, beyond which nothing is.
    """

    slot: jax.Array
    start: jax.Array
    reach: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class All:
    """One token of every slot; start [B] int32: how much has been read before it; reach: as in `One`."""

    start: jax.Array
    reach: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Plain:
    """Vectors [B, K, S, C], in which attention is computed: heads in front, so that nothing is moved to attend."""

    vectors: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> "Plain":
        return cls(jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        return self.vectors.shape[2]

    def put(self, new: jax.Array, where: One | All) -> "Plain":
        """With vectors [1, T, K, C] for `One`, [B, 1, K, C] for `All`, in their places."""
        return Plain(_write(self.vectors, new, where))

    def get(self, where: One | All, dtype: Any) -> jax.Array:
        """[1 or B, K, reach, C]: what `where` looks at; in a type of its own in place of the compute type."""
        return _read(self.vectors, where)


@flax.struct.dataclass
class Int8:
    """The same in int8, with a scale for each token and head: half of bfloat16's memory.

    Attributes:
      rounded: [B, K, S, C] int8.
      scale: [B, K, S, 1] bfloat16; rounded first, so that its own rounding makes no error.
    """

    rounded: jax.Array
    scale: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> "Int8":
        return cls(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.bfloat16))

    @property
    def capacity(self) -> int:
        return self.rounded.shape[2]

    def put(self, new: jax.Array, where: One | All) -> "Int8":
        """See `Plain.put`."""
        new = new.astype(jnp.float32)
        scale = (jnp.maximum(jnp.max(jnp.abs(new), axis=-1, keepdims=True), 1e-30) / INT8).astype(jnp.bfloat16)
        rounded = jnp.clip(jnp.round(new / scale.astype(jnp.float32)), -INT8, INT8)
        return Int8(_write(self.rounded, rounded, where), _write(self.scale, scale, where))

    def get(self, where: One | All, dtype: Any) -> jax.Array:
        """See `Plain.get`; in `dtype`."""
        return _read(self.rounded, where).astype(dtype) * _read(self.scale, where).astype(dtype)


KINDS = {
    "": Plain.empty,  # in the compute type
    "bfloat16": lambda shape, dtype: Plain.empty(shape, jnp.bfloat16),
    "int8": Int8.empty,
}


def kind_for(wanted: str, int8: bool) -> str:
    """Of `KINDS`: the one wanted; without a wish bfloat16 for weights in int8, which are rounded more than that."""
    return wanted or ("bfloat16" if int8 else "")


def _write(cache, new, where):
    if isinstance(where, One):
        new = new.astype(cache.dtype).transpose(0, 2, 1, 3)
        return jax.lax.dynamic_update_slice(cache, new, (where.slot, 0, where.start, 0))
    return cache.at[jnp.arange(len(cache)), :, where.start].set(new[:, 0].astype(cache.dtype))


def _read(cache, where):
    rows = jax.lax.dynamic_slice_in_dim(cache, where.slot, 1) if isinstance(where, One) else cache
    return rows[:, :, : where.reach]


@flax.struct.dataclass
class LayerSlots:
    """Keys and values of one layer."""

    key: Plain | Int8
    value: Plain | Int8

    @classmethod
    def empty(cls, config: StackConfig, slots: int, capacity: int, dtype: Any, kind: str = "") -> "LayerSlots":
        """`kind`: of `KINDS`."""
        shape = (slots, config.num_kv_heads, capacity, config.head_dim)
        return cls(KINDS[kind](shape, dtype), KINDS[kind](shape, dtype))

    @property
    def capacity(self) -> int:
        """S."""
        return self.key.capacity

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, where: One | All, execution: Execution
    ) -> tuple[jax.Array, "LayerSlots"]:
        """See `transformer.LayerCache`; query [1, T, H, C] for `One`, [B, 1, H, C] for `All`."""
        made = LayerSlots(self.key.put(key, where), self.value.put(value, where))
        # Else the write is fused into each that reads it, for which XLA's CPU backend copies the caches several times.
        made = jax.lax.optimization_barrier(made)
        return _attention(query, made.key.get(where, query.dtype), made.value.get(where, query.dtype), where), made


def _attention(query, key, value, where):
    """query [B, T, H, C] over key and value [B, K, S, C], of which those up to the query's own place are seen."""
    B, T, H, C = query.shape
    K, S = key.shape[1:3]
    query = query.reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, C]
    rows = query.reshape(B, K, -1, C).astype(key.dtype)
    scores = product(rows, key, jnp.float32).reshape(*query.shape[:-1], S) * C**-0.5
    last = jnp.reshape(where.start, (-1, 1, 1)) + jnp.arange(T)[:, None]  # [B, T, 1]
    seen = jnp.arange(S) <= last
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bksc->bkgtc", probabilities, value, preferred_element_type=query.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)
