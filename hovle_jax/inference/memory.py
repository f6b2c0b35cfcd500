"""What answers take of a device's memory: known from the config, before anything is read or compiled."""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.inference.layer import PRODUCTS
from hovle_jax.inference.slots import fused
from hovle_jax.model.hovle import HoVLE

SLOTS = 8  # answers at once, unless there is room for fewer
WORK = 2**28  # bytes left to what programs compute with


def size(tree: Any) -> int:
    """Bytes of arrays, or of their shapes; one that stands in several places counts once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def gigabytes(count: int) -> str:
    """'1.25 GB'."""
    return f"{count / 1e9:.2f} GB"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes that weights take.

    Attributes:
      kept: while there are answers.
      reading: at most before, while they are read and fused.
      second: of the weights as they were trained, which are among those kept where attention maps need them.
    """

    kept: int = 0
    reading: int = 0
    second: int = 0

    def without_second(self) -> str:
        """What to do about the second copy, in words; nothing where there is none."""
        return f"; {gigabytes(self.second)} are a second copy (serve --noattention)" if self.second else ""

    @classmethod
    def of(cls, config: ModelConfig, hovle: HoVLE, int8: bool = False, keep: bool = False) -> "Weights":
        """Of a finished model.

        Args:
          int8, keep: as for `answering.AnsweringModel`.
        """
        names = ("embedding", "llm") if config.embedding else ("llm",)
        read = {name: shapes(config, name) for name in names}
        made = jax.eval_shape(lambda params: fused(params, hovle, int8), read)
        tables = size({name: made[name] for name in names})  # and all else that is not in layers
        is_shared = jax.numpy.dtype(hovle.execution.dtype) == jax.numpy.float32  # with what was read
        head = 0 if hovle.config.llm.tied and not int8 else size(made["head"])
        new = size(made["layers"]) + head + (0 if is_shared else tables)
        if keep:
            return cls(size(read) + new, size(read) + new, size(read))
        # Products are made one after another, each for a whole stack.
        group = max(size([getattr(w, name) for w in layers]) for layers in made["layers"].values() for name in PRODUCTS)
        return cls(size(made["layers"]) + head + tables, size(read) + group + (0 if is_shared else tables))


@dataclasses.dataclass(frozen=True)
class Budget:
    """What there is for answers, and what they take.

    Attributes:
      free: bytes of the memory; None = not known: then all fits.
      caches: (slots, length) -> bytes of so many answers at once, each of so many tokens with its prompt.
      weights: what has still to be read.
    """

    free: int | None
    caches: Callable[[int, int], int]
    weights: Weights = Weights()

    def slots(self, wanted: int | None, length: int) -> int:
        """How many answers at once there is room for: those wanted, or, without a wish, up to `SLOTS`.

        Raises:
          UserError: it does not fit; with the numbers, and the most that does.
        """
        if self.free is None:
            return wanted or SLOTS
        if self.weights.reading + WORK > self.free:
            raise UserError(self._too_heavy())
        fit = self._most(lambda slots: self.caches(slots, length), wanted or SLOTS)
        if fit < (wanted or 1):
            raise UserError(self._too_many(wanted or 1, length, fit))
        return fit

    def _most(self, caches, wanted):
        """The largest number up to the one wanted whose caches fit."""
        left = (self.free or 0) - self.weights.kept - WORK
        return bisect.bisect_right(range(1, wanted + 1), left, key=caches)

    def _too_heavy(self):
        return (
            f"the weights take {gigabytes(self.weights.kept)}, and {gigabytes(self.weights.reading)} while they are "
            f"read: {gigabytes(self.free or 0)} of memory are free; end what else runs here, or use a machine with more"
            f"{self.weights.without_second()}"
        )

    def _too_many(self, slots, length, fit):
        caches, kept = self.caches(slots, length), self.weights.kept
        beside = f" beside {gigabytes(kept)} of weights" if kept else ""
        shorter = self._most(lambda tokens: self.caches(slots, tokens), length)
        ways = [f"slots={fit}"] * (fit > 0) + [f"length={shorter}"] * (shorter > 1)
        most = " or ".join(ways) or "less than one token: use a machine with more"
        return (
            f"slots={slots}, length={length}: {slots} answers at once of {length:,} tokens each take "
            f"{gigabytes(caches)} of caches{beside}, and {gigabytes(self.free or 0)} of memory are free; the most that "
            f"fits is {most}{self.weights.without_second()}"
        )
