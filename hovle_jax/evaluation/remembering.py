"""The answers of an evaluation as they come, from which the same command goes on after it was interrupted."""

import collections
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.evaluation.asking import Asking
from hovle_jax.system.json_lines import adding_to, whole_lines


class Memory:
    """Answers in the order of their questions.

    Attributes:
      path: of the file: a line of what they depend on, then ["question", answer, or [reason, detail] of one that cannot
        be asked] each.
      known: those that were there before and were not asked for yet.
    """

    def __init__(self, path: pathlib.Path, known: list, add: Callable[[Any], None]):
        self.path, self.known, self._add = path, collections.deque(known), add

    def of(self, asking: Asking) -> Asking:
        """The same, but that what is known is not asked again and what is answered is remembered."""

        def remembering(*model):
            ask = asking(*model)

            def answers(items):
                items = iter(items)
                while self.known and (item := next(items, None)) is not None:
                    yield self._known(item.question)
                read = collections.deque()
                for answer in ask(read.append(item) or item for item in items):
                    is_bad = isinstance(answer, BadSample)
                    said = [answer.reason, str(answer.detail)] if is_bad else answer
                    self._add([read.popleft().question, said])
                    yield answer

            return answers

        return remembering

    def _known(self, question):
        before, answer = self.known.popleft()
        if before != question:
            raise UserError(f"{self.path} answers {before!r} where {question!r} is asked: delete it, to start again")
        return BadSample(*answer) if isinstance(answer, list) else answer


@contextlib.contextmanager
def remembered(predictions: pathlib.Path, about: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Memory]:
    """The memory of an evaluation, in PREDICTIONS.answers; removed when the block succeeds.

    Args:
      about: JSON values that the answers depend on; where the file has others, it is begun again.
      say: is told which of the two it is.
    Raises:
      UserError: it cannot be written.
    """
    path = predictions.with_name(f"{predictions.name}.answers")
    known = _known_answers(path, dict(about), say)
    is_done = False
    try:
        with adding_to(path, "name another folder with --out") as add:
            if not known:
                add(dict(about))
            yield Memory(path, known, add)
        is_done = True
    finally:
        with contextlib.suppress(OSError):
            if is_done or len(whole_lines(path)) < 2:
                path.unlink()


def _known_answers(path, about, say):
    """[[question, answer]]; a file of other answers is emptied."""
    try:
        lines = [json.loads(line) for line in whole_lines(path)]
    except (OSError, ValueError):
        lines = [{}]
    before, *known = lines or [about]
    differs = [f"{name} was {before.get(name)!r} and is {value!r}" for name, value in about.items()
               if before.get(name) != value]  # fmt: skip
    if differs:
        say(f"{path} has answers of another evaluation ({'; '.join(differs)}): starting again")
        known = []
    if known:
        say(f"{path} has {len(known):,} answers: going on from there")
    elif path.exists():
        path.unlink()
    return known
