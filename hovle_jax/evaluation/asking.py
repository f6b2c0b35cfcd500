"""Questions of different lengths, asked in few shapes: each shape is a program that is compiled."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Prompt, answer_samples
from hovle_jax.inference.limits import check_lengths
from hovle_jax.inference.load import Loaded

# Items -> their answers, or why an item cannot be asked.
Ask = Callable[[Sequence], list[str | BadSample]]

SHORTEST = 64  # tokens: prompts up to this length are of one class
STEP = 16  # tokens by which rows grow


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
    """What lets the LLM answer; an item that the model cannot read is 'cannot_be_asked'."""
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

    return ask
