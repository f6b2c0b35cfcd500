"""Attention over grouped heads, by the implementation that fits the device.

Dimension letters: B batch, L queries, S keys, H heads, K kv heads, G = H / K, C head dim.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hovle_jax.model import splash
from hovle_jax.model.attention_blocks import SHORTEST, attend_causal
from hovle_jax.model.execution import OneDevice
from hovle_jax.model.splash import ATTENTION

# 'auto' is resolved by the command from the mesh's devices, before a model is made.
IMPLEMENTATIONS = ("auto", "xla", "blocks", "splash", "cudnn")

# What the backward pass may find kept (`transformer.KEPT`): what the kernel reads, and what it leaves.
QUERY, KEY, VALUE = "query", "key", "value"


@flax.struct.dataclass
class AttentionMask:
    """Who may look at whom, as integer maps; an implementation turns them into what it needs.

    A query sees a key when both lie in the same segment and, if `causal`, no key comes after its
    query. Segment 0 is padding: its rows attend to each other only, and nobody reads their result.

    Attributes:
      query_segments: [B, L] int32.
      key_segments: [B, S] int32.
      query_index: [B, L] or [1, L] int32, the place in the row (not the rotary position).
      key_index: [B, S] or [1, S] int32.
      causal: static.
      whole: static; queries and keys are the same whole rows, so that an index is a place in the arrays.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_index: jax.Array
    key_index: jax.Array
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def for_rows(cls, segment_ids: jax.Array, causal: bool = True) -> "AttentionMask":
        """The mask of whole rows (training, prefill without a cache): segment_ids is [B, L]."""
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        return cls(segment_ids, segment_ids, index, index, causal, whole=True)

    def dense(self) -> jax.Array:
        """-> [B, L, S] bool, True where attention is allowed."""
        allowed = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            allowed &= self.key_index[:, None, :] <= self.query_index[:, :, None]
        return allowed


@flax.struct.dataclass
class CausalRows:
    """A dense mask that is known to be False above the diagonal, for 'blocks'; allowed: [B, L, L] bool."""

    allowed: jax.Array


def choose(
    implementation: str, head_dim: int, masked: bool = True, whole: bool = True, causal: bool = True
) -> tuple[str, str]:
    """What will really run, and why not what was asked for.

    Args:
      implementation: one of `IMPLEMENTATIONS`, resolved.
      masked: whether there is a mask; whole, causal: of what kind (see `AttentionMask`).
    Returns:
      (implementation, reason or '').
    """
    if implementation == "blocks" and not (masked and whole and causal):
        return "xla", "attention in blocks reads whole causal rows"
    if implementation == "splash":
        if head_dim % splash.LANES:
            return "xla", f"splash attention needs heads of a multiple of {splash.LANES} and these have {head_dim}"
        if not (masked and whole):
            return "xla", "splash attention reads whole rows with segments"
    if implementation == "cudnn" and head_dim % 8:
        return "xla", f"cuDNN's attention needs heads of a multiple of 8 and these have {head_dim}"
    return implementation, ""


def prepare(mask: AttentionMask, implementation: str, head_dim: int) -> Any:
    """What `attend` needs of a mask, made once for all layers of a stack."""
    chosen, _ = choose(implementation, head_dim, whole=mask.whole, causal=mask.causal)
    if chosen == "splash":
        return mask
    return CausalRows(mask.dense()) if chosen == "blocks" else mask.dense()


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Any = None,
    implementation: str = "xla",
    placement: OneDevice = OneDevice(),
) -> jax.Array:
    """Softmax attention in float32 with grouped key and value heads.

    Args:
      query: [B, L, H, C].
      key, value: [B, S, K, C]; H is a multiple of K, and query head h reads kv head h // (H / K).
      mask: what `prepare` made, or None for full attention.
      implementation: static; one of `IMPLEMENTATIONS`, resolved.
      placement: static; where the arrays lie.
    Returns:
      [B, L, H, C] in the type of `query`.
    """
    whole = isinstance(mask, (AttentionMask, CausalRows))
    chosen, _ = choose(implementation, query.shape[-1], masked=mask is not None, whole=whole)
    if chosen == "splash":  # keeps what its own backward pass reads, heads in front
        return _splash(query, key, value, mask, placement)
    out = _ATTEND[chosen](*_named(query, key, value), mask, placement)
    return checkpoint_name(out, ATTENTION)


def _named(query, key, value):
    return checkpoint_name(query, QUERY), checkpoint_name(key, KEY), checkpoint_name(value, VALUE)


def _blocks(query, key, value, mask: CausalRows, placement):
    if query.shape[1] < SHORTEST:
        return _xla(query, key, value, mask.allowed, placement)
    return attend_causal(query, key, value, mask.allowed)


def _xla(query, key, value, allowed, placement):
    B, L, H, C = query.shape
    K = key.shape[2]
    # Heads in front: on the CPU each (batch, kv head) is then one contiguous matmul, with the
    # queries that share a kv head as rows of one matrix.
    query = query.reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4)  # [B, K, G, L, C]
    key = key.transpose(0, 2, 1, 3)  # [B, K, S, C]
    value = value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkglc,bksc->bkgls", query, key, preferred_element_type=jnp.float32)
    scores = scores * (C**-0.5)
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgls,bksc->bkglc", probabilities, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def _cudnn(query, key, value, allowed, placement):
    """cuDNN's flash attention, in a 16-bit type, as it has no other."""
    half = query.dtype if query.dtype == jnp.float16 else jnp.bfloat16
    mask = None if allowed is None else allowed[:, None]
    out = jax.nn.dot_product_attention(
        query.astype(half), key.astype(half), value.astype(half), mask=mask, implementation="cudnn"
    )
    return out.astype(query.dtype)


def _splash(query, key, value, mask: AttentionMask, placement):
    """The Pallas kernels that skip what lies above the diagonal and never hold [L, S].

    Each device runs them on its own rows and heads. Where rows are sharded along their length, queries stay sharded,
    and keys and values are gathered: with few kv heads they are small.
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    query, key, value = _named(*(x.transpose(0, 2, 1, 3) for x in (query, key, value)))  # heads in front
    heads, length = query.shape[1:3]
    of_queries, of_keys = ("batch", "heads", "length", None), ("batch", "kv_heads", None, None)
    _, head_shards, length_shards, _ = placement.shards(of_queries, query.shape)
    whole = splash.padded_length(length, length_shards)
    rows = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, whole - length), (0, 0)))
    segments = jnp.pad(mask.query_segments, ((0, 0), (0, whole - length)))
    places = jnp.arange(whole, dtype=jnp.int32)
    kernel = splash.forward_kernel(heads, whole, mask.causal, head_shards, length_shards)

    def local(kernel, query, key, value, query_segments, places, key_segments, key_places):
        queries, keys = splash.Tokens(query_segments, places), splash.Tokens(key_segments, key_places)
        return splash.attend(kernel, query, key, value, queries, keys, mask.causal, length_shards == 1)

    # Where an axis lies is decided by the length without its padding.
    inputs = (
        (kernel, ("heads", "length"), (heads, length)),
        (rows(query), of_queries, query.shape),
        (rows(key), of_keys, key.shape),
        (rows(value), of_keys, value.shape),
        (segments, ("batch", "length"), mask.query_segments.shape),
        (places, ("length",), (length,)),
        (segments, ("batch", None), mask.query_segments.shape),
        (places, (None,), (length,)),
    )
    out = placement.per_shard(local, inputs, of_queries, query.shape)
    return out[:, :, :length].transpose(0, 2, 1, 3)


_ATTEND = {"xla": _xla, "blocks": _blocks, "cudnn": _cudnn}
