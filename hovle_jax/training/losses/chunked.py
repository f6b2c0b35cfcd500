"""The cross-entropy of a large vocabulary, a chunk of it at a time, on a mesh.

Dimension letters: B batch, L tokens, T = B L, D width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hovle_jax.model.execution import row_major
from hovle_jax.model.hovle import PADDING_LOGIT
from hovle_jax.model.splash import LANES
from hovle_jax.sharding.matmul import MatmulSharding, axis_index, gather, reduce_gradient


def chunked_cross_entropy(
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunk: int,
    sharding: MatmulSharding = MatmulSharding(),
    keeps: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`losses.cross_entropy` of the logits x @ kernel, which never exist but for `chunk` of the vocabulary at a time.

    The backward pass makes each chunk again from the rows' log-sum-exp: one matmul more than with kept logits. Or it
    finds their exponentials kept, in the type of the matmul: these are what it needs, and rounding a logit would change
    its probability by much more. The loop goes over the vocabulary and not over tokens, so that a chunk of the kernel
    is gathered, and its gradient summed over the mesh, once.

    Args:
      x: [B, L, D], normalised.
      kernel: [D, V] with logical axes ('embed', 'vocab'), in the type of the matmul.
      targets: [B, L] int32; weights: [B, L] float32, 0 where not supervised.
      vocab_size: real tokens; the columns after them are padding.
      chunk: columns.
      sharding: how x @ kernel lies on the mesh (`Placement.matmul_sharding`).
      keeps: exponentials for the backward pass, [T, V] in all.
    Returns:
      (weighted sum in nats, sum of weights).
    """
    return _chunked(_Chunks(sharding, vocab_size, chunk, keeps), x, kernel, targets, weights), jnp.sum(weights)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """What is static: where things lie, and the pieces of the vocabulary."""

    sharding: MatmulSharding
    vocab_size: int
    chunk: int
    keeps: bool

    def loop(self, kernel, body, carry, kept=None, ahead=False):
        """Runs body(carry, start, columns [D, chunk], ids [chunk] or -1, kept of the chunk) -> (carry, to keep).

        Over all of this device's columns -> (carry, what is kept of all chunks).

        The last chunk begins early, so that all are of one size; what it repeats has the id -1, as padding has.

        Args:
          ahead: gather columns beside the matmul of those before them; libtpu does so by itself where there are two.
        """
        total, first = kernel.shape[1], kernel.shape[1] * axis_index(self.sharding.features)
        count = -(-total // self.chunk)
        size = min(-(-total // (count * LANES)) * LANES, self.chunk, total)  # little is repeated
        start_of = lambda i: jnp.minimum(i * size, total - size)

        def gathered(i):
            shard = jax.lax.dynamic_slice_in_dim(kernel, start_of(i), size, 1)
            return gather(shard, self.sharding.sharded, self.sharding.phases)

        def step(carry, each):
            (columns, carry), (i, kept) = carry, each
            following = gathered(jnp.minimum(i + 1, count - 1)) if ahead else None
            columns, start = columns if ahead else gathered(i), start_of(i)
            here = start + jnp.arange(size, dtype=jnp.int32)
            counts = (here >= i * size) & (first + here < self.vocab_size)
            carry, kept = body(carry, start, columns, jnp.where(counts, first + here, -1), kept)
            return (following, carry), kept

        carry = gathered(0) if ahead else None, carry
        (_, carry), kept = jax.lax.scan(step, carry, (jnp.arange(count), kept))
        return carry, kept

    @property
    def kept_spec(self):
        """Of what is kept of all chunks, [chunks, T, ...]: as a device has it, of its rows and its columns."""
        return PartitionSpec(self.sharding.features or None, self.sharding.rows or None)

    def per_shard(self, local, outputs, x, kernel, *rows):
        """Runs local(x, kernel, *rows) on each device's shards; `outputs` are specs. What is kept are tuples."""
        of_rows = PartitionSpec(*self.sharding.x[:-1])
        specs = [self.kept_spec if isinstance(each, tuple) else of_rows for each in rows]
        return self.sharding.per_shard(local, (self.sharding.x, self.sharding.kernel, *specs), outputs)(
            x, kernel, *rows
        )


def _logits(x, columns, ids):
    """[T, chunk] float32, those that do not count out of the way."""
    return jnp.where(ids >= 0, jnp.dot(x, columns, preferred_element_type=jnp.float32), PADDING_LOGIT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunks, x, kernel, targets, weights):
    return _chunked_forward(chunks, x, kernel, targets, weights)[0]


def _chunked_forward(chunks: _Chunks, x, kernel, targets, weights):
    sharding = chunks.sharding

    def local(x, kernel, targets, weights):
        rows, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)

        def body(carry, _, columns, ids, __):
            highest, total, found = carry
            logits = _logits(rows, columns, ids)
            higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
            found += jnp.sum(jnp.where(ids == wanted, logits, 0.0), axis=-1)
            exponentials = jnp.exp(logits - higher[:, None])
            if chunks.keeps:  # and summed afterwards, as they are kept
                return (higher, total, found), (row_major(exponentials.astype(x.dtype)), higher)
            return (higher, total * jnp.exp(highest - higher) + jnp.sum(exponentials, axis=-1), found), None

        zeros = jnp.zeros(len(rows), jnp.float32)
        (highest, total, found), kept = chunks.loop(kernel, body, (zeros + PADDING_LOGIT, zeros, zeros), ahead=True)
        if kept is not None:
            sums = jnp.sum(kept[0], axis=-1, dtype=jnp.float32)
            total = jnp.sum(sums * jnp.exp(kept[1] - highest), axis=0)
        if sharding.features:  # each device saw its part of the vocabulary
            part, highest = highest, jax.lax.pmax(highest, sharding.features)
            total = jax.lax.psum(total * jnp.exp(part - highest), sharding.features)
            found = jax.lax.psum(found, sharding.features)
        log_sum = highest + jnp.log(total)
        losses = log_sum - found
        loss, shape = jnp.sum(losses * weights.reshape(-1)), targets.shape
        loss = jax.lax.psum(loss, sharding.rows) if sharding.rows else loss
        return loss, losses.reshape(shape), log_sum.reshape(shape), kept

    of_rows, whole = PartitionSpec(*sharding.x[:-1]), PartitionSpec()
    loss, *saved = chunks.per_shard(local, (whole, of_rows, of_rows, chunks.kept_spec), x, kernel, targets, weights)
    return loss, (x, kernel, targets, weights, *saved)


def _chunked_backward(chunks: _Chunks, saved, g):
    sharding = chunks.sharding
    x, kernel, targets, weights, losses, log_sum, kept = saved

    def local(x, kernel, targets, scale, losses, log_sum, kept):
        rows, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)
        losses, log_sum, scale = (of_rows.reshape(-1, 1) for of_rows in (losses, log_sum, scale))

        def body(carry, start, columns, ids, kept):
            dx, dkernel = carry
            if kept is None:
                probabilities = jnp.exp(_logits(rows, columns, ids) - log_sum)
                dlogits = (probabilities - (ids == wanted)) * scale
            else:  # that of the target is made again: what is left of it may be little
                exponentials, highest = row_major(kept[0]), kept[1]
                probabilities = exponentials * jnp.exp(highest[:, None] - log_sum)
                dlogits = jnp.where(ids == wanted, jnp.expm1(-losses), probabilities) * scale
            dlogits = dlogits.astype(x.dtype)
            dx += jnp.dot(dlogits, columns.T, preferred_element_type=jnp.float32)
            dcolumns = reduce_gradient(rows.T @ dlogits, sharding.rows, sharding.scattered, sharding.phases)
            # Columns that are repeated have no id here, and keep what the chunk before gave them.
            before = jax.lax.dynamic_slice_in_dim(dkernel, start, columns.shape[1], 1)
            return (dx, jax.lax.dynamic_update_slice_in_dim(dkernel, before + dcolumns, start, 1)), None

        carry = jnp.zeros(rows.shape, jnp.float32), jnp.zeros(sharding.gradient_shard(kernel.shape), kernel.dtype)
        (dx, dkernel), _ = chunks.loop(kernel, body, carry, kept)
        if sharding.features:
            dx = jax.lax.psum(dx, sharding.features)
        return dx.astype(x.dtype).reshape(x.shape), dkernel

    outputs = (sharding.x, sharding.gradient)
    dx, dkernel = chunks.per_shard(local, outputs, x, kernel, targets, weights * g, losses, log_sum, kept)
    return dx, dkernel, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
