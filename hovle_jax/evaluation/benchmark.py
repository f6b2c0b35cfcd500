"""What a benchmark is: a source, a prompt and a scorer; and how a model goes through one."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.evaluation.asking import Asking, generated
from hovle_jax.evaluation.intervals import MeanScore
from hovle_jax.evaluation.scorers import Scorer, exact
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.load import Loaded


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      images: Pillow images or [H, W, 3] uint8.
      turns: ((question, answer), ..., (question, None)): what is asked, after what was said before.
      references: the right answers.
      options: the texts of a multiple choice, A first.
      group: those of one group have a score of their own.
      system: the system message; empty = the model's own.
      where: (file, row) that it comes from.
    """

    images: tuple
    turns: tuple
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    system: str = ""
    where: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, image: Any, question: str, *references: str, **more) -> "Item":
        """One question about one image."""
        return cls((image,), ((question, None),), references, **more)

    @property
    def question(self) -> str:
        """What is asked last."""
        return self.turns[-1][0]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question with its answer and its score, 0 to 1."""

    item: Item
    answer: str
    score: float


def as_it_is(item: Item) -> Prompt:
    """The item's own words; without marks its images come first."""
    return Prompt(item.turns, item.images, item.system)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of the table (`benchmarks.py`).

    Attributes:
      items: () -> its items, or BadEvents in place of those that cannot be asked.
      prompt: an item -> what the model is asked.
      scorer: of `scorers.py`.
      components: those of the model that it needs.
      ask: (model, prompt, max_new_tokens, batch_size) -> what answers items; `asking.generated` lets the LLM speak.
      max_new_tokens: the longest answer.
      batch_size: questions that are answered together.
      metric: what the mean score is called; that of a group is 'METRIC GROUP'.
      parts: {name: function of a text}: scores of a part of the answer, compared with the same part of the reference.
      unit: what is counted.
      source: the data.source whose runs are scored on it at their end; empty = none.
      at_the_end: how many of the first items that takes, unless the run's config says another number; 0 = all.
    """

    items: Callable[[], Iterable[Item | BadEvent]]
    components: tuple[str, ...] = ("embedding", "llm")
    prompt: Callable[[Item], Prompt] = as_it_is
    scorer: Scorer = exact
    ask: Asking = generated
    max_new_tokens: int = 64
    batch_size: int = 32
    metric: str = "accuracy"
    parts: dict[str, Callable[[str], str]] = dataclasses.field(default_factory=dict)
    unit: str = "questions"
    source: str = ""
    at_the_end: int = 0

    def answered(self, loaded: Loaded, items: Iterable[Item | BadEvent]) -> Iterator[Answered | BadEvent]:
        """Asks a model, and scores its answers. In order."""
        for one in self.asked(loaded, items):
            yield one if isinstance(one, BadEvent) else self._scored(*one)

    def asked(self, loaded: Loaded, items: Iterable[Item | BadEvent]) -> Iterator[tuple[Item, str] | BadEvent]:
        """Each item with a model's answer, as answers come, so that of a large source little is in memory."""
        read = collections.deque()  # and not passed on

        def sound():
            for item in items:
                read.append(item)
                if isinstance(item, Item):
                    yield item

        for answer in self.ask(loaded, self.prompt, self.max_new_tokens, self.batch_size)(sound()):
            while isinstance(read[0], BadEvent):
                yield read.popleft()
            yield _with_answer(read.popleft(), answer)
        yield from read

    def _scored(self, item, answer):
        return Answered(item, answer, self.scorer(answer, item.references, item.options))

    def means(self, answered: Sequence[Answered]) -> dict[str, MeanScore]:
        """{name: mean score}: of all, of each group, of each part; empty where nothing was answered."""
        if not answered:
            return {}
        groups = dict.fromkeys(a.item.group for a in answered if a.item.group)
        found = {self.metric: self._mean(answered)}
        for group in groups:
            found[f"{self.metric} {group}"] = self._mean([a for a in answered if a.item.group == group])
        for name, part in self.parts.items():
            found[f"{self.metric} {name}"] = self._mean([self._part(a, part) for a in answered])
        return found

    def _part(self, answered, part):
        references, answer = tuple(map(part, answered.item.references)), part(answered.answer)
        item = dataclasses.replace(answered.item, references=references)
        return Answered(item, answer, self.scorer(answer, references, item.options))

    def _mean(self, answered):
        references, options = [a.item.references for a in answered], [a.item.options for a in answered]
        return MeanScore.of([a.score for a in answered], references, options, self.scorer)

    def scores(self, answered: Sequence[Answered]) -> dict[str, float]:
        """{name: percent, ..., unit: count}, the main one first."""
        means = {name: round(mean.percent, 3) for name, mean in self.means(answered).items()}
        return means | {self.unit: len(answered)}


def _with_answer(item, answer):
    if isinstance(answer, BadSample):
        file, row = item.where
        return BadEvent(-1, "", file, row, answer.reason, answer.detail)
    return item, answer
