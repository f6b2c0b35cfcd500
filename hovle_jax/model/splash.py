"""Splash attention, the Pallas kernels for TPUs that skip blocks of keys that come after all queries of a block.

The forward kernel is JAX's (`jax.experimental.pallas.ops.tpu.splash_attention`). The backward one is written here: it
makes all gradients at once, by 5 matmuls a block. JAX's makes two of them twice, or else what queries get from each
block of keys by itself, to be summed outside. Here that sum stays in vector memory.

Dimension letters: B batch, H heads, K kv heads, G = H / K, L queries, S keys, C head dim.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ATTENTION = "attention"  # what the forward kernel leaves for the backward one, for `jax.checkpoint`'s policies
LANES = 128  # of a TPU's vector registers
MOST_BLOCK = 1024  # queries and keys of a block
KEY_STEP = 512  # keys of a block that the forward pass takes at a time: from its schedules on v5e, for 1, 2 and 4 steps
SMALL_BLOCK = 896  # from the compiler's schedules of kernels with blocks of 640 and of 1,024, forward and backward
MASKED = -0.7 * float(np.finfo(np.float32).max)  # a score whose exponential is 0, whatever is the largest of its row

_SUMS_BYTES = 15 * 2**20  # most that the gradients of a kv head's queries take in vector memory
_BLOCKS_BYTES = 20 * 2**20  # what the rest of the backward kernel takes: blocks of scores, inputs and results

# Dimension numbers of a @ b.T, a @ b and a.T @ b.
_ROWS, _COLUMNS, _BY_ROW = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def padded_length(length: int, shards: int = 1) -> int:
    """The length that rows are padded to: of those that blocks of 128 to MOST_BLOCK divide, that which costs least.

    A causal row of n tokens meets n (n + block) / 2 pairs, and a block's own work is as much as that of SMALL_BLOCK
    more of its tokens: 14,080 tokens are faster as 14 blocks of 1,024 than as 22 of 640.

    Args:
      shards: of the row; each is whole blocks.
    """
    padded = lambda size: -(-length // (size * shards)) * size * shards
    cost = lambda size: padded(size) * (padded(size) + size) * (1 + SMALL_BLOCK / size)
    return padded(min(range(LANES, MOST_BLOCK + 1, LANES), key=cost))


def block_of(length: int) -> int:
    """The largest multiple of 128 that divides the length and is at most MOST_BLOCK."""
    return max(size for size in range(LANES, MOST_BLOCK + 1, LANES) if length % size == 0)


@flax.struct.dataclass
class Tokens:
    """Segments and places of a row's queries or keys; a place is where a token lies in its whole row.

    Attributes:
      segments: [B, L] int32, or [L] of one row.
      places: [L] int32.
    """

    segments: jax.Array
    places: jax.Array

    def codes(self, causal: bool, length: int) -> jax.Array:
        """As the segments; a query sees a key where its code less the key's, modulo 2^32, lies in [0, reach) (`_seen`).

        The difference of two segments is at least twice the reach, of two places less than it. Segments may differ by
        2^31 / reach: as many as the tokens of any row of less than 32,768.
        """
        return self.segments * (2 * reach(length)) + self.places * causal


def reach(length: int) -> int:
    """A power of two above every place of a row."""
    return 1 << (length - 1).bit_length()


def forward_kernel(heads: int, length: int, causal: bool, head_shards: int, length_shards: int) -> Any:
    """JAX's kernel for whole rows: as few blocks as fit, each dividing a device's shard of the row."""
    # slow to import
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    keys = block_of(length)
    sizes = kernels.BlockSizes(
        block_q=block_of(length // length_shards),
        block_kv=keys,
        block_kv_compute=KEY_STEP if keys % KEY_STEP == 0 else keys,
    )
    mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=head_shards,
        q_seq_shards=length_shards,
        block_sizes=sizes,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    queries: Tokens,
    keys: Tokens,
    causal: bool,
    whole: bool,
) -> jax.Array:
    """Attention of a device's shard of rows.

    Args:
      kernel: of `forward_kernel`.
      query: [B, H, L, C], scaled.
      key, value: [B, K, S, C].
      queries, keys: [B, L] and [B, S] segments, [L] and [S] places.
      causal: whether a query sees no later key.
      whole: whether the queries are whole rows, too; else they are a shard of their length.
    Returns:
      [B, H, L, C].
    """
    return _forward(kernel, query, key, value, queries, keys)


def _forward(kernel, query, key, value, queries, keys):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    run = lambda q, k, v, s, t: kernel(q, k, v, segment_ids=SegmentIds(s, t))
    return jax.vmap(run)(query, key, value, queries.segments, keys.segments)


def _forward_and_kept(kernel, query, key, value, queries, keys, causal, whole):
    saving = type(kernel)(kernel.fwd_mask_info, None, None, **kernel.kwargs | {"save_residuals": True})
    out, (log_sum,) = _forward(saving, query, key, value, queries, keys)
    # Named here: a policy of `jax.checkpoint` does not look into a function that has a gradient of its own.
    out, log_sum = checkpoint_name(out, ATTENTION), checkpoint_name(log_sum, ATTENTION)
    return out, (query, key, value, queries, keys, out, log_sum)


def _backward(causal, whole, kept, d_out):
    query, key, value, queries, keys, out, log_sum = kept
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # of the gradients of probabilities
    length, (G, C) = key.shape[2], (query.shape[1] // key.shape[1], query.shape[3])
    codes, key_codes = queries.codes(causal, length), keys.codes(causal, length)
    size = block_of(query.shape[2])
    # As many blocks of queries at a time as have room for their gradients.
    chunk = max(1, _SUMS_BYTES // (G * size * C * 4)) * size
    d_queries, d_keys, d_values = [], [], []
    for first in range(0, query.shape[2], chunk):
        part = lambda x, axis=2: jax.lax.slice_in_dim(x, first, min(first + chunk, query.shape[2]), axis=axis)
        rows, place = part(query), first if whole else queries.places[first]
        computed = computed_blocks(rows.shape[2], length, place, causal)
        of_rows = (rows, part(d_out), part(log_sum), part(mean), part(codes, 1))
        dq, dk, dv = gradients(of_rows, key, value, key_codes, computed)
        for parts, made in ((d_queries, dq), (d_keys, dk), (d_values, dv)):
            parts.append(made)
    if len(d_queries) == 1:
        return None, *d_queries, *d_keys, *d_values, None, None
    total = lambda parts: functools.reduce(jnp.add, [x.astype(jnp.float32) for x in parts]).astype(parts[0].dtype)
    return None, jnp.concatenate(d_queries, axis=2), total(d_keys), total(d_values), None, None


attend.defvjp(_forward_and_kept, _backward)


def computed_blocks(queries: int, keys: int, place: Any, causal: bool) -> Any:
    """[S / block, L / block] int8: which blocks have a query that may see a key; place: of the first query."""
    last, first = np.arange(block_of(queries) - 1, queries, block_of(queries)), np.arange(0, keys, block_of(keys))
    seen: Any = (first[:, None] <= place + last[None]) | (not causal)
    return seen.astype(np.int8)


def gradients(
    of_rows: Sequence[jax.Array], key: jax.Array, value: jax.Array, key_codes: jax.Array, computed: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of attention's inputs, by one kernel.

    Args:
      of_rows: query and d_out, [B, H, L, C]; [B, H, L] float32 of the exponentials of a query's scores the logarithm of
        the sum, and of its probabilities' gradients the mean; codes, [B, L].
      key, value: [B, K, S, C].
      key_codes: [B, S], see `Tokens.codes`.
      computed: [S / block, L / block] int8, blocks that are not skipped.
    Returns:
      [B, H, L, C], and twice [B, K, S, C].
    """
    query, d_out, log_sum, mean, codes = of_rows
    (B, H, L, C), (K, S) = query.shape, key.shape[1:3]
    G, size, key_size = H // K, block_of(L), block_of(S)
    # What a skipped step reads is what the next one that is not needs: nothing is fetched for it.
    first = computed.argmax(axis=1).astype(np.int32)
    at = lambda j, i, first: jnp.maximum(i, first[j])
    of_query = lambda b, k, j, g, i, first, _: (b, k * G + g, at(j, i, first), 0)
    rows = pl.BlockSpec((None, None, size, C), of_query)
    numbers = pl.BlockSpec((None, None, 1, size), lambda b, k, j, g, i, first, _: (b, k * G + g, 0, at(j, i, first)))
    keys = pl.BlockSpec((None, None, key_size, C), lambda b, k, j, g, i, *_: (b, k, j, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(B, K, S // key_size, G, L // size),
        in_specs=[
            *(rows, rows, numbers, numbers),
            pl.BlockSpec((None, 1, size), lambda b, k, j, g, i, first, _: (b, 0, at(j, i, first))),
            *(keys, keys),
            pl.BlockSpec((None, key_size, LANES), lambda b, k, j, g, i, *_: (b, j, 0)),
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), keys, keys],
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.float32) for shape in ((G, L, C), (key_size, C), (key_size, C))),
            pltpu.VMEM((size, C), query.dtype),
            pltpu.SemaphoreType.DMA,
        ],
    )
    kernel = pl.pallas_call(
        functools.partial(_kernel, reach=reach(S)),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_BLOCKS_BYTES + G * L * C * 4,
        ),
        name="splash_gradients",
    )
    across = jnp.broadcast_to(key_codes[:, :, None], (B, S, LANES))  # keys lie along sublanes
    return kernel(
        first, computed, query, d_out, log_sum[:, :, None], mean[:, :, None], codes[:, None], key, value, across
    )


def _kernel(_, computed, q, do, log_sum, mean, codes, k, v, key_codes, dq, dk, dv, *scratch, reach):
    """A block of keys (j) and of one head's queries (g, i). dk_sum and dv_sum go over g and i, dq_sum over j too."""
    dq_sum, dk_sum, dv_sum, done, copied = scratch
    b, k_head, j, g, i = map(pl.program_id, range(5))
    blocks, groups, size = pl.num_programs(2), pl.num_programs(3), q.shape[0]
    mine = pl.ds(pl.multiple_of(i * size, size), size)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _():
        dq_sum[g, mine, :] = jnp.zeros(q.shape, jnp.float32)

    @pl.when(computed[j, i].astype(jnp.int32) != 0)
    def _():
        scores = _dot(k[...], q[...], _ROWS)  # [keys, queries]
        scores = jnp.where(_seen(codes[...], key_codes[:, :1], scores.shape, reach), scores, MASKED)
        p = jnp.exp(scores - log_sum[...])
        dv_sum[...] += _dot(p.astype(do.dtype), do[...], _COLUMNS)
        ds = (p * (_dot(v[...], do[...], _ROWS) - mean[...])).astype(q.dtype)
        dk_sum[...] += _dot(ds, q[...], _COLUMNS)
        dq_sum[g, mine, :] += _dot(ds, k[...], _BY_ROW)

    @pl.when(j == blocks - 1)
    def _():
        done[...] = dq_sum[g, mine, :].astype(done.dtype)
        copy = pltpu.make_async_copy(done, dq.at[b, k_head * groups + g, mine, :], copied)
        copy.start()
        copy.wait()

    @pl.when((g == groups - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _seen(codes, key_codes, shape, reach):
    """Whether the difference is less than the reach as an unsigned number: as signed ones, both with 2^31 added."""
    difference = jnp.broadcast_to(codes + np.int32(-(2**31)), shape) - jnp.broadcast_to(key_codes, shape)
    return difference < np.int32(reach - 2**31)
