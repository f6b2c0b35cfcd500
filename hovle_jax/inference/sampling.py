"""How the next token is chosen: filters of the distribution, then a draw that belongs to the request alone.

Dimension letters: B rows, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError

GONE = -jnp.inf  # the logit of a token that a filter took out


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen. The filters apply in the order of their fields.

    Attributes:
      repetition_penalty: what a token that was read or made before is made less likely by (Keskar et al. 2019,
        section 4.1): its logit is divided by it where positive, else multiplied. 1 = off.
      temperature: what logits are divided by; 0 takes the most likely token.
      top_k: only the k most likely tokens, and those as likely as the k-th. 0 = off.
      top_p: only the fewest tokens whose probabilities sum to p (Holtzman et al. 2020, section 3.1). 1 = off.
      min_p: only tokens at least this share as likely as the most likely one (Nguyen et al. 2024). 0 = off.
      seed: of the draws.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, fine, allowed in (
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not fine:
                raise UserError(f"{name}={getattr(self, name)}: it must be {allowed}")

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most likely token as the model has it."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


@flax.struct.dataclass
class SamplingRows:
    """The fields of `Sampling` for each row: [B]."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "SamplingRows":
        """Arrays of the host."""
        types = {"top_k": np.int32, "seed": np.uint32}
        column = lambda name: np.asarray([getattr(row, name) for row in rows], types.get(name, np.float32))
        return cls(**{field.name: column(field.name) for field in dataclasses.fields(Sampling)})

    def at(self, row: jax.Array, other: "SamplingRows") -> "SamplingRows":
        """These rows with the one of `other` in the place of one."""
        return jax.tree.map(lambda mine, theirs: mine.at[row].set(theirs[0]), self, other)


def penalized(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """The repetition penalty [B] on logits [B, V] of the tokens that were `seen`, [B, V] bool."""
    strength = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * strength, logits / strength), logits)


def filtered(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Temperature and filters; of what is left the softmax is drawn from.

    Args:
      logits: [B, V] float32. A row of temperature 0 is read as if it were 1.
    Returns:
      [B, V] float32, `GONE` where a token was taken out; at least one stays.
    """
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    is_filtered = (rows.top_k > 0) | (rows.top_p < 1)
    logits = jax.lax.cond(jnp.any(is_filtered), _top_k_and_p, lambda logits, _: logits, logits, rows)
    return jnp.where(logits - jnp.max(logits, axis=-1, keepdims=True) < jnp.log(rows.min_p)[:, None], GONE, logits)


def _top_k_and_p(logits, rows):
    """One sort for both: this costs more than all else, so it runs only where a row asks for it."""
    V = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, V), V)
    kth = jnp.take_along_axis(ascending, (V - k)[:, None], axis=-1)
    kept = ascending >= kth
    below = jnp.cumsum(jax.nn.softmax(jnp.where(kept, ascending, GONE), axis=-1), axis=-1)
    is_last = jnp.arange(V) == V - 1
    kept &= (below > 1 - rows.top_p[:, None]) | (rows.top_p >= 1)[:, None] | is_last
    kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, GONE)


def most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> (the token of the largest logit [B] int32, the first of equals; that logit [B]) of logits [B, V].

    Two plain reductions: that of `argmax`, over pairs, is a loop over single numbers on the CPU backend.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    V = logits.shape[-1]
    places = jnp.where(logits == highest, jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(places, axis=-1), highest[:, 0]


def draw(logits: jax.Array, rows: SamplingRows, index: jax.Array) -> jax.Array:
    """The next token of each row, [B] int32, from logits [B, V] after the penalty.

    Args:
      index: [B] int32: which token of its answer it is. With the row's seed it makes the random key, so that a draw
        does not depend on the other rows.
    """
    greedy, _ = most_likely(logits)

    def drawn():
        keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(rows.seed, index)
        sampled = jax.vmap(jax.random.categorical)(keys, filtered(logits, rows)).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, sampled, greedy)

    return jax.lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: greedy)
