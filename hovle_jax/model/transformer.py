"""The decoder of InternLM2, Llama and Qwen: the holistic embedding and the LLM are stacks of this one layer.

Dimension letters: B batch, L tokens, D width, H heads, K kv heads, C head dim, F ffn width, N layers, S cache capacity.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hovle_jax.errors import UserError
from hovle_jax.model import splash
from hovle_jax.model.attention import (
    KEY,
    QUERY,
    VALUE,
    AttentionMask,
    attend,
    choose,
    prepare,
)
from hovle_jax.model.config import StackConfig
from hovle_jax.model.dense import Dense, dense, partitioned
from hovle_jax.model.execution import Execution, LogicalAxes
from hovle_jax.model.int8 import int8_matmul
from hovle_jax.model.rotary import needs_lengths, rotary_angles, rotate, text_lengths
from hovle_jax.model.splash import ATTENTION

# What the backward pass of a layer can find kept, by the names of the matmuls that make it.
LAYER_INPUT, OUTPUT, GATE, UP = "layer_input", "output", "gate", "up"
LOGITS = "logits"  # of the loss
KEPT = (LAYER_INPUT, QUERY, KEY, VALUE, ATTENTION, OUTPUT, GATE, UP, LOGITS)
ON_HOST = "@host"
MATMULS = ",".join(KEPT[1:])  # with these no matmul is made again, and no kernel of attention


def _dots(primitive, *operands, **params):
    """Results of matmuls, but for wider ones: rotary's permutation, in float32, costs next to nothing to make again."""
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params)
    return saveable and params["preferred_element_type"] in (None, operands[0].dtype)


# Words for what is kept: all; results of matmuls; the layer's input; that in the host's memory.
_POLICIES = {
    "none": None,
    "dots": _dots,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
REMATS = tuple(_POLICIES)  # what keeps most first


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight: InternLM2's order, which matters in bfloat16."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", partitioned(nn.initializers.ones, "embed_vector"), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


@flax.struct.dataclass
class Cache:
    """Keys and values of one stack, and how many of each slot's places are filled.

    Attributes:
      key, value: [N, B, S, K, C].
      length: [B] int32.
      is_empty: static; nothing is filled yet: the tokens that come first are whole rows to attention.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, config: StackConfig, slots: int, capacity: int, dtype: Any = jnp.float32) -> "Cache":
        shape = (config.num_layers, slots, capacity, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((slots,), jnp.int32), is_empty=True)

    def repeated(self, times: int) -> "Cache":
        """Each slot so many times, side by side."""
        key, value = (jnp.repeat(leaf, times, axis=1) for leaf in (self.key, self.value))
        return Cache(key, value, jnp.repeat(self.length, times), self.is_empty)

    def mask(self, segment_ids: jax.Array) -> AttentionMask:
        """The mask of new tokens [B, L] (segment 1, padding 0) that are appended to what is cached."""
        if self.is_empty:
            return AttentionMask.for_rows(segment_ids)
        B, L = segment_ids.shape
        S = self.key.shape[2]
        return AttentionMask(
            query_segments=jnp.ones((B, L), jnp.int32),
            key_segments=jnp.ones((B, S), jnp.int32),
            query_index=self.length[:, None] + jnp.arange(L, dtype=jnp.int32)[None],
            key_index=jnp.arange(S, dtype=jnp.int32)[None],
        )

    def advanced(self, layers: "LayerCache", segment_ids: jax.Array) -> "Cache":
        """The cache after its layers were written: lengths grow by each row's real tokens."""
        return Cache(layers.key, layers.value, self.length + jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32))


@flax.struct.dataclass
class Appended:
    """Where new tokens go in a `Cache` and what they see.

    Attributes:
      start: [B] int32; None: at the beginning of an empty cache, where they see nothing else.
      mask: as `attention.prepare` made it.
    """

    start: jax.Array | None
    mask: Any


@flax.struct.dataclass
class LayerCache:
    """One layer's place in the keys and values of its stack; other kinds of cache have the same method.

    Attributes:
      key, value: [N, B, S, K, C] of all layers: a loop over layers that carries them updates them in place.
      layer: int32 scalar.
    """

    key: jax.Array
    value: jax.Array
    layer: Any

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, where: Appended, execution: Execution
    ) -> tuple[jax.Array, "LayerCache"]:
        """Writes new keys and values [B, L, K, C] and lets the queries [B, L, H, C] read what is there then.

        Returns:
          (out [B, L, H, C], the cache).
        """
        written = LayerCache(self._with(self.key, key, where), self._with(self.value, value, where), self.layer)
        if where.start is not None:
            read = lambda cache: jax.lax.dynamic_index_in_dim(cache, self.layer, keepdims=False).astype(query.dtype)
            key, value = read(written.key), read(written.value)
        return attend(query, key, value, where.mask, execution.attention, execution.placement), written

    def _with(self, cache, new, where):
        """The cache with new [B, L, K, C] in this layer, each row from its own start."""
        new = new.astype(cache.dtype)
        if where.start is None:
            return jax.lax.dynamic_update_slice(cache, new[None], (self.layer, 0, 0, 0, 0))
        rows, places = jnp.arange(len(new))[:, None], where.start[:, None] + jnp.arange(new.shape[1])
        return cache.at[self.layer, rows, places].set(new, unique_indices=True)


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    config: StackConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, cache, angles, where):
        """One layer.

        Args:
          x: [B, L, D].
          cache: a `LayerCache` or another with its method; or None.
          where: what the cache's method wants; without a cache the mask, as `attention.prepare` made it.
        Returns:
          (x, cache).
        """
        return self.run(x, cache, angles, where)

    def run(self, x: jax.Array, cache: Any, angles: tuple[jax.Array, jax.Array], where: Any) -> tuple[jax.Array, Any]:
        x = self.execution.row_major(x)
        x, cache = self.attention(checkpoint_name(x, LAYER_INPUT), cache, angles, where)
        return self.feed_forward(x), cache

    def attention(
        self, x: jax.Array, cache: Any, angles: tuple[jax.Array, jax.Array], where: Any
    ) -> tuple[jax.Array, Any]:
        c, how = self.config, self.execution
        B, L = x.shape[:2]
        y = RMSNorm(c.norm_eps, name="attention_norm")(x)

        def heads(name, count, axis):
            projected = self.dense(count * c.head_dim, ("embed", axis), name, c.qkv_bias)(y)
            if c.qk_norm:  # whose gradient reads it
                projected = checkpoint_name(projected, name)
            return projected.reshape(B, L, count, c.head_dim)

        query, key = heads("query", c.num_heads, "heads"), heads("key", c.num_kv_heads, "kv_heads")
        value = heads("value", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            query = RMSNorm(c.norm_eps, name="query_norm")(query)
            key = RMSNorm(c.norm_eps, name="key_norm")(key)
        query, key = (rotate(x, *angles, by_matmul=how.attention == "splash") for x in (query, key))  # on TPUs
        if cache is None:
            out = attend(query, key, value, where, how.attention, how.placement)
        else:
            out, cache = cache.attend(query, key, value, where, how)
        out = how.row_major(out.reshape(B, L, c.num_heads * c.head_dim))
        output = self.dense(c.width, ("heads", "embed"), "output", c.output_bias, branches=2 * c.num_layers)
        return x + checkpoint_name(output(out), OUTPUT), cache

    def dense(self, features: int, axes: LogicalAxes, name: str, use_bias: bool, branches: int = 1) -> Dense:
        """A matmul of the layer, see `dense`."""
        how = self.execution
        return dense(features, axes, name, how, use_bias, branches, int8_matmul if how.int8 else None)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """SwiGLU: down(silu(gate x) * up x)."""
        c, how = self.config, self.execution
        y = RMSNorm(c.norm_eps, name="ffn_norm")(x)
        wide = lambda name: how.row_major(self.dense(c.mlp_width, ("embed", "mlp"), name, c.mlp_bias)(y))
        gate, up = (checkpoint_name(wide(name), name) for name in (GATE, UP))
        down = self.dense(c.width, ("mlp", "embed"), "down", c.mlp_bias, branches=2 * c.num_layers)
        return x + down(nn.silu(gate) * up)


class CachedLayer(DecoderLayer):
    """The same layer where a loop carries the caches of all layers beside x."""

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, LayerCache], layer: jax.Array, angles: Any, where: Appended) -> Any:
        x, cache = carry
        return self.run(x, LayerCache(cache.key, cache.value, layer), angles, where), None


def remat_policy(remat: str) -> Callable | None:
    """What the backward pass of a layer finds kept; the rest it makes again.

    Args:
      remat: of `REMATS`, or names of `KEPT`, as 'query,key,value'; NAME@host waits in the host's memory.
    Raises:
      UserError: there is no such name.
    """
    if remat in _POLICIES:
        return _POLICIES[remat]
    kept, offloaded = kept_names(remat)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


def kept_names(remat: str) -> tuple[list[str], list[str]]:
    """-> (names that stay on the device, names that wait in the host's memory). Raises UserError: `remat_policy`."""
    names = [name.strip() for name in remat.split(",")]
    kept, offloaded = ([name.removesuffix(ON_HOST) for name in names if name.endswith(ON_HOST) == on] for on in (0, 1))
    unknown = sorted({*kept, *offloaded} - {*KEPT} | {*offloaded} & {LOGITS})
    if unknown:
        raise UserError(
            f"execution.remat={remat!r} is not one of {', '.join(REMATS)}, and not a list of what is kept: "
            f"{unknown[0]!r} is none of {', '.join(KEPT)} (NAME{ON_HOST} waits in the host's memory)"
        )
    return kept, offloaded


def keeps_logits(remat: str) -> bool:
    """Whether the backward pass of the loss finds its logits."""
    return remat in ("none", "dots") if remat in _POLICIES else LOGITS in kept_names(remat)[0]


def rematerialised(layer: type[nn.Module], execution: Execution) -> Any:
    """The layer class, of which the backward pass finds kept what the execution says."""
    policy = remat_policy(execution.remat)
    return layer if policy is None else nn.remat(layer, policy=policy, prevent_cse=False)


def scanned(layer: type[nn.Module], execution: Execution, num_layers: int, broadcast: int) -> Any:
    """The layer class repeated by scan: parameters [N, ...], the first argument after x scanned, the rest shared.

    Unrolling changes the program alone, never the parameter tree, so checkpoints do not depend on it.
    """
    layer = rematerialised(layer, execution)
    in_axes: Any = (0,) + (nn.broadcast,) * broadcast
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=0,
        length=num_layers,
        unroll=num_layers if execution.unroll_layers else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Stack(nn.Module):
    """A scanned stack of decoder layers, without a final norm."""

    config: StackConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, positions, segment_ids, cache: Cache | None = None):
        """Runs the layers.

        Args:
          x: [B, L, D].
          positions: [B, L] int32 rotary positions.
          segment_ids: [B, L] int32, 0 for padding. With a cache: 1 for tokens to append, padding at the end.
          cache: what came before; tokens are written after it.
        Returns:
          ([B, L, D], the new cache or None).
        """
        if self.config.num_layers == 0:
            return x, cache
        length = x.shape[1]
        if cache is None:
            x, positions, segment_ids = self._padded(x, positions, segment_ids)
        mask = AttentionMask.for_rows(segment_ids) if cache is None else cache.mask(segment_ids)
        # Without the barrier the CPU backend computes sines and cosines anew for every head of every layer.
        longest = x.shape[1] if cache is None else cache.key.shape[2]
        lengths = text_lengths(positions, segment_ids) if needs_lengths(self.config, longest) else None
        angles = jax.lax.optimization_barrier(rotary_angles(positions, self.config, lengths))
        constrain = lambda x: self.execution.placement.constrain(x, ("batch", "length", "embed_act"))
        x = constrain(x.astype(self.execution.dtype))
        mask = prepare(mask, self.execution.attention, self.config.head_dim)
        layers = lambda layer: scanned(layer, self.execution, self.config.num_layers, broadcast=2)(
            self.config, self.execution, name="layers"
        )
        if cache is None:
            x, _ = layers(DecoderLayer)(x, None, angles, mask)
            return constrain(x[:, :length]), None
        where = Appended(None if cache.is_empty else cache.length, mask)
        carry, numbers = (x, LayerCache(cache.key, cache.value, 0)), jnp.arange(self.config.num_layers)
        (x, written), _ = layers(CachedLayer)(carry, numbers, angles, where)
        return constrain(x), cache.advanced(written, segment_ids)

    def _padded(self, x, positions, segment_ids):
        """Rows of the length that splash attention wants: once, and not in every layer."""
        how, length = self.execution, x.shape[1]
        if choose(how.attention, self.config.head_dim)[0] != "splash":
            return x, positions, segment_ids
        shards = how.placement.shards(("batch", "length", "embed_act"), x.shape)[1]
        padding = (0, splash.padded_length(length, shards) - length)
        pad = lambda array: jnp.pad(array, ((0, 0), padding, *[(0, 0)] * (array.ndim - 2)))
        return pad(x), pad(positions), pad(segment_ids)


class TokenTable(nn.Module):
    """A table of token vectors [V, D]; rows are taken by id and cast to the compute type.

    Attributes:
      axis: the logical axis of its rows.
    """

    size: int
    width: int
    execution: Execution
    axis: str = "vocab"

    def setup(self) -> None:
        init = partitioned(nn.initializers.normal(self.width**-0.5), self.axis, "embed")
        self.embedding = self.param("embedding", init, (self.size, self.width))

    def __call__(self, tokens):
        return jnp.take(self.embedding.astype(self.execution.dtype), tokens, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """The table as a tied head: [..., D] -> [..., V]."""
        table = self.embedding.astype(self.execution.dtype)
        if x.size == x.shape[-1]:  # one vector: the CPU backend is five times slower with the table transposed
            return (table @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
        return self.execution.placement.matmul(x, table.T, ("embed", "vocab"))
