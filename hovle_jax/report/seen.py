"""How much a run has read: the tokens, images and samples of all batches, over all its processes.

Letters: B batch, L tokens, M tiles, P visual tokens per tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.report.facts import SEEN


class Seen:
    """Counts what batches hold, on the devices, where a global batch is, so that no step waits.

    Attributes:
      before: {'tokens_seen', 'images_seen', 'samples_seen': number} of the steps before this process; None = unknown.
    """

    def __init__(self, before: dict[str, int] | None):
        self.before = before
        self._counted = [0] * len(SEEN)
        self._waiting: list[jax.Array] = []

    @classmethod
    def since(cls, first_step: int, last_row: dict) -> "Seen":
        """Continues the counts in the metrics of the step that a run is resumed from."""
        if first_step == 0:
            return cls(dict.fromkeys(SEEN, 0))
        known = last_row.get("step") == first_step and all(name in last_row for name in SEEN)
        return cls({name: int(last_row[name]) for name in SEEN} if known else None)

    def add(self, batch: dict[str, jax.Array], drawn: int) -> None:
        """Counts a batch on the devices; the numbers are read later.

        Args:
          drawn: samples in the rows that this host made, which cannot be read off the batch.
        """
        fields = {name: batch[name] for name in ("tokens", "segment_ids", "image_positions") if name in batch}
        fields["samples"] = _spread(drawn, batch["tokens"])
        tiles = batch["tiles"].shape[1] if "tiles" in batch else 0
        self._waiting.append(_counter(batch["tokens"].sharding, tiles)(fields))

    def here(self) -> dict[str, int]:
        """The counts of this process; waits for its batches."""
        for counts in jax.device_get(self._waiting):
            self._counted = [total + int(count) for total, count in zip(self._counted, counts)]
        self._waiting = []
        return dict(zip(SEEN, self._counted))

    def totals(self) -> dict[str, int]:
        """The counts of the run from its beginning; {} where they are unknown."""
        here = self.here()
        return {} if self.before is None else {name: self.before[name] + count for name, count in here.items()}


def _spread(drawn: int, tokens: jax.Array) -> jax.Array:
    """[B]: each host's samples spread over its rows; the sum is that of all hosts, also where hosts share rows."""
    rows, sharding = len(tokens), tokens.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    share = np.float32(drawn / _rows_here(sharding, rows))
    size = lambda index: len(range(*index[0].indices(rows)))
    fill = lambda index: np.full(size(index), share)
    return jax.make_array_from_callback((rows,), sharding, fill)


@functools.cache
def _rows_here(sharding: jax.sharding.Sharding, rows: int) -> int:
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return sum(stop - start for start, stop, _ in {index[0].indices(rows) for index in indices if index})


@functools.cache
def _counter(sharding: jax.sharding.Sharding, tiles: int):
    """`count`, compiled for batches of this sharding; every host gets the whole result."""
    whole = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(functools.partial(count, tiles=tiles), out_shardings=whole)


def count(batch: dict[str, jax.Array], tiles: int) -> jax.Array:
    """Tokens, images and samples of a batch, int32 [3].

    An image is a run of neighbouring visual tokens, of however many tiles. In a contrastive batch each row is an image
    with its caption, and the padding of captions counts.

    Args:
      batch: tokens [B, L] and samples [B]; segment_ids [B, L] unless contrastive; with images, image_positions
        [B, M * P].
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
