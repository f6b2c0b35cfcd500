"""Attention over grouped heads.

Dimension letters: B batch, L queries, S keys, H heads, K kv heads, G = H / K, C head dim.
"""

import flax.struct
import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla",)


@flax.struct.dataclass
class AttentionMask:
    """Who may look at whom, as integer maps; an implementation turns them into what it needs.

    A query sees a key when both lie in the same segment and, if `causal`, the key's index is not behind
    the query's. Segment 0 is padding: its rows attend to each other only, and nobody reads their result.

    Attributes:
      query_segments: [B, L] int32.
      key_segments: [B, S] int32.
      query_index: [B, L] or [1, L] int32, the place in the row (not the rotary position).
      key_index: [B, S] or [1, S] int32.
      causal: static.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_index: jax.Array
    key_index: jax.Array
    causal: bool = flax.struct.field(pytree_node=False, default=True)

    @classmethod
    def for_rows(cls, segment_ids, causal=True):
        """The mask of whole rows (training, prefill without a cache): segment_ids is [B, L]."""
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        return cls(segment_ids, segment_ids, index, index, causal)

    def dense(self):
        """-> [B, L, S] bool, True where attention is allowed."""
        allowed = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            allowed &= self.key_index[:, None, :] <= self.query_index[:, :, None]
        return allowed


def attend(query, key, value, allowed=None, implementation="xla"):
    """Softmax attention in float32 with grouped key and value heads.

    Args:
      query: [B, L, H, C].
      key, value: [B, S, K, C]; H is a multiple of K, and query head h reads kv head h // (H / K).
      allowed: [B, L, S] bool, or None for full attention.
      implementation: static; resolved by the command from the mesh's devices.
    Returns:
      [B, L, H, C] in the type of `query`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    B, L, H, C = query.shape
    K = key.shape[2]
    # Heads in front: on the CPU each (batch, kv head) is then one contiguous matrix product, with the
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
