"""How a benchmark's questions are asked.

In batches of few shapes, each of which is a program that is compiled, or through an engine in which each question has a
slot (`--slots`). Batches read many short prompts at once and wait for the longest answer of each.
"""

import collections
import dataclasses
import datetime
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Request
from hovle_jax.inference.generate import Prompt, answer_samples
from hovle_jax.inference.growing import GrowingEngine
from hovle_jax.inference.limits import check_lengths
from hovle_jax.inference.load import Loaded, load_run
from hovle_jax.inference.many import in_order
from hovle_jax.inference.slots import fused
from hovle_jax.system.batching import batched

# Items -> their answers in order as they come, or why an item cannot be asked.
Ask = Callable[[Iterable], Iterator[str | BadSample]]
# (model, prompt, max_new_tokens, batch_size) -> what asks it.
Asking = Callable[[Loaded, Callable[..., Prompt], int, int], Ask]

SHORTEST = 64  # tokens: prompts up to this length are of one class
STEP = 16  # tokens by which rows grow
BATCHES_AT_ONCE = 4  # are sorted by their shapes together
INT8_SLOTS = 8  # unless --slots says another number


@dataclasses.dataclass
class Shapes:
    """The length and the tiles of rows, by class of prompts; classes differ by powers of 2, and their rows only grow.

    So prompts much like those before them need no other program, and short ones no row of the longest.

    Attributes:
      rows: of a batch.
    """

    rows: int = 1
    made: dict[tuple, tuple] = dataclasses.field(default_factory=dict)

    def add_rows(self, wanted: int, most: int) -> None:
        """Batches for so many prompts at a time: a power of 2, and `most` at most."""
        self.rows = max(self.rows, min(most, 1 << (wanted - 1).bit_length()))

    def group(self, samples: dict[int, Sample]) -> list[tuple[list[int], int, int]]:
        """-> [(keys of samples, length, tiles)]."""
        members = collections.defaultdict(list)
        for key, sample in samples.items():
            size = max(len(sample.tokens), SHORTEST), max(len(sample.tiles), 1)
            members[tuple((n - 1).bit_length() for n in size)].append(key)
        return [(keys, *self._grown(c, [samples[key] for key in keys])) for c, keys in sorted(members.items())]

    def _grown(self, of, samples):
        length, tiles = self.made.get(of, (0, 1))
        longest = max(len(sample.tokens) for sample in samples)
        self.made[of] = max(length, -(-longest // STEP) * STEP), max(tiles, *(len(s.tiles) for s in samples))
        return self.made[of]


def generated(loaded: Loaded, prompt: Callable[..., Prompt], max_new_tokens: int, batch_size: int) -> Ask:
    """What lets the LLM answer in batches; an item that the model cannot read is 'cannot_be_asked'."""
    answerer, shapes = loaded.answerer, Shapes()

    def sample_of(item):
        asked = prompt(item)
        sample = answerer.processor.sample(asked.turns, asked.images, asked.system, asked.max_tiles)
        check_lengths(answerer.hovle.config.llm, len(sample.tokens), max_new_tokens, len(sample.tiles))
        return sample

    def ask(items):
        answers, samples = {}, {}
        for i, item in enumerate(items):
            try:
                samples[i] = sample_of(item)
            except UserError as error:
                answers[i] = BadSample("cannot_be_asked", error)
        shapes.add_rows(len(samples), batch_size)
        for keys, length, tiles in shapes.group(samples):
            part = [samples[key] for key in keys]
            answers |= zip(keys, answer_samples(answerer, part, max_new_tokens, shapes.rows, length, tiles))
        return [answers[i] for i in range(len(items))]

    return lambda items: itertools.chain.from_iterable(map(ask, batched(items, BATCHES_AT_ONCE * batch_size)))


def through_engine(slots: int, int8: bool = False) -> Asking:
    """The same through an engine of so many slots. It is for one model, whose own parameters it takes away.

    Args:
      int8: weights in int8.
    """
    weights = []  # once they are made

    def asking(loaded, prompt, max_new_tokens, batch_size):
        if not weights:
            weights.append(fused(loaded.params, loaded.models.hovle, int8, consume=True))
        engine = GrowingEngine(loaded.answerer, slots, weights[0])

        def submit(item):
            try:
                return engine.submit(prompt(item), Request(max_new_tokens))
            except UserError as error:
                return BadSample("cannot_be_asked", error)

        return lambda items: (answer for _, answer in in_order(engine, items, submit))

    return asking


def written(folder: pathlib.Path) -> str:
    """When the newest file of a model was written: another time after more training."""
    newest = max(path.stat().st_mtime for path in (folder / "model").rglob("*"))
    return datetime.datetime.fromtimestamp(newest, datetime.timezone.utc).isoformat()


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is loaded and asked.

    Attributes:
      slots: of an engine; 0 = in batches.
      dtype: as in `hovle_jax.load`; 'int8' is done by an engine.
    """

    slots: int = 0
    dtype: str = ""

    def load(self, folder: str | os.PathLike, components: Sequence[str] | None = None) -> Loaded:
        """See `load_run`."""
        return load_run(folder, components, "" if self.dtype == "int8" else self.dtype)

    def about(self, folder: str | os.PathLike) -> dict[str, Any]:
        """What the answers of a model depend on; the number of slots is no part of it."""
        path = pathlib.Path(folder).resolve()
        return {"checkpoint": str(path), "model written": written(path), "dtype": self.dtype}

    def of(self, benchmark: Any) -> Any:
        """The benchmark asked in this way. Raises UserError where no LLM answers it."""
        slots = self.slots or (INT8_SLOTS if self.dtype == "int8" else 0)
        if not slots:
            return benchmark
        if "llm" not in benchmark.components:
            raise UserError("no LLM answers this benchmark: leave --slots and --dtype int8 out")
        return dataclasses.replace(benchmark, ask=through_engine(slots, self.dtype == "int8"))
