"""How much a run has read: tokens, images and samples of all its batches, over all its processes.

Letters: B batch, L tokens, M tiles, P visual tokens of a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.report.facts import SEEN


class Seen:
    """Adds up what batches hold. They are counted on the devices, where a global batch is, so that no step waits.

    Attributes:
      before: {'tokens_seen', 'images_seen', 'samples_seen': number} of the steps before this process; None = not known.
    """

    def __init__(self, before: dict[str, int] | None):
        self.before = before
        self._counted = [0] * len(SEEN)
        self._waiting = []

    @classmethod
    def since(cls, first_step: int, last_row: dict) -> "Seen":
        """Goes on from the metrics of the step that a run continues from."""
        if first_step == 0:
            return cls(dict.fromkeys(SEEN, 0))
        known = last_row.get("step") == first_step and all(name in last_row for name in SEEN)
        return cls({name: int(last_row[name]) for name in SEEN} if known else None)

    def add(self, batch: dict[str, jax.Array], drawn: int) -> None:
        """Counts a batch that lies on the devices; its numbers are read later.

        Args:
          drawn: samples of the rows that this host has made, of which the batch alone does not tell.
        """
        fields = {name: batch[name] for name in ("tokens", "segment_ids", "image_positions") if name in batch}
        fields["samples"] = _spread(drawn, batch["tokens"])
        tiles = batch["tiles"].shape[1] if "tiles" in batch else 0
        self._waiting.append(_counter(batch["tokens"].sharding, tiles)(fields))

    def here(self) -> dict[str, int]:
        """What this process has read; waits for the batches."""
        for counts in jax.device_get(self._waiting):
            self._counted = [total + int(count) for total, count in zip(self._counted, counts)]
        self._waiting = []
        return dict(zip(SEEN, self._counted))

    def totals(self) -> dict[str, int]:
        """What the run has read from its beginning on; {} where that is not known."""
        here = self.here()
        return {} if self.before is None else {name: self.before[name] + count for name, count in here.items()}


def _spread(drawn: int, tokens: jax.Array) -> jax.Array:
    """[B], each host's samples spread over its rows: its sum is that of all hosts, also where several share rows."""
    rows, sharding = len(tokens), tokens.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    share = np.float32(drawn / _rows_here(sharding, rows))
    size = lambda index: len(range(*index[0].indices(rows)))
    return jax.make_array_from_callback((rows,), sharding, lambda index: np.full(size(index), share))


@functools.cache
def _rows_here(sharding: jax.sharding.Sharding, rows: int) -> int:
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return sum(stop - start for start, stop, _ in {index[0].indices(rows) for index in indices})


@functools.cache
def _counter(sharding: jax.sharding.Sharding, tiles: int):
    """Compiled for batches that lie so; on every host the result is whole."""
    whole = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(functools.partial(count, tiles=tiles), out_shardings=whole)


def count(batch: dict[str, jax.Array], tiles: int) -> jax.Array:
    """Tokens, images and samples of a batch, int32 [3].

    An image is a run of neighbouring visual tokens, however many tiles it was cut into. In a contrastive batch each row
    is an image with its caption, and the padding of captions is counted.

    Args:
      batch: tokens [B, L], samples [B]; unless it is contrastive, segment_ids [B, L]; with images [B, M * P] positions.
      tiles: M.
    """
    tokens, samples = batch["tokens"], jnp.round(jnp.sum(batch["samples"])).astype(jnp.int32)
    rows, length = tokens.shape
    if "segment_ids" not in batch:
        return jnp.stack([jnp.int32(tokens.size), jnp.int32(rows), samples])
    images = jnp.int32(0)
    if tiles and "image_positions" in batch:
        places = batch["image_positions"].reshape(rows, tiles, -1)
        first, last = places[:, :, 0], places[:, :, -1]
        follows = jnp.pad(last[:, :-1] + 1, ((0, 0), (1, 0)), constant_values=-1) == first
        images = jnp.sum((first < length) & ~follows, dtype=jnp.int32)
    return jnp.stack([jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32), images, samples])
