"""Clients that each ask again as soon as they are answered, and what they see."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from hovle_jax.inference.bench.cases import Case
from hovle_jax.inference.bench.subject import draw, read
from hovle_jax.inference.engine import CHUNKS, Engine, Request, Stream
from hovle_jax.inference.texts import TextSoFar
from hovle_jax.system import compilations
from hovle_jax.system.progress import track, waiting

ATTEMPTS = 3  # to measure while nothing is compiled
SHORT, CHUNKS_OF_IT = CHUNKS[0], 2  # tokens of a short prompt, and steps that read one at most
STEPS = 24  # of decoding alone after short prompts


class Timed(Stream):
    """An answer that notes when it was asked for and when each of its tokens came, in seconds of `perf_counter`."""

    def __init__(self, asked: float, *arguments: Any):
        super().__init__(*arguments)
        self.asked, self.times = asked, []

    def take(self, *made: Any, **more: Any) -> None:
        """See `Stream`."""
        self.times.append(time.perf_counter())
        super().take(*made, **more)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
      end: when the host had its tokens.
      is_alone: whether no prompt was being read.
      longest: tokens that the longest answer had.
    """

    end: float
    is_alone: bool
    longest: int


@dataclasses.dataclass(frozen=True)
class Seen:
    """A stretch of time in which all streams were busy and, if it could be had, nothing was compiled.

    Attributes:
      answers: how many were completed.
      asked: all requests until then, those that are being answered included.
      programs_before, programs: compiled before it, and in it.
    """

    start: float
    end: float
    answers: int
    asked: list[Timed]
    steps: list[Step]
    programs_before: int
    programs: int


class Clients:
    """One for each stream of a case.

    Attributes:
      asked: all requests so far.
      steps: all steps so far.
    """

    def __init__(self, case: Case, engine: Engine):
        self._case, self._engine = case, engine
        self.asked: list[Timed] = []
        self.steps: list[Step] = []

    def answers(self) -> Iterator[Timed]:
        """Endless; each is given when it is complete, before its client asks again."""
        waited_for = [self._ask() for _ in range(self._case.streams)]
        while True:
            is_alone = all(stream.tokens for stream in waited_for)
            self._engine.step()
            longest = max(len(stream.tokens) for stream in waited_for)
            self.steps.append(Step(time.perf_counter(), is_alone, longest))
            done = [stream for stream in waited_for if stream.finish]
            if len(done) == len(waited_for):
                self._engine.run()  # a step that had begun before the host saw the end
            yield from done
            waited_for = [self._ask() if stream.finish else stream for stream in waited_for]

    def _ask(self):
        answerer = self._engine.answerer
        sample, start = draw(answerer, self._case, seed=len(self.asked)), time.perf_counter()
        request, text = Request(self._case.new_tokens), TextSoFar(answerer.tokenizer)
        stream = Timed(start, read(answerer, sample), request, (), text, lambda piece: None)
        self._engine.enqueue(stream)
        self.asked.append(stream)
        return stream


def watch(case: Case, engine: Engine, answers: int, say: Callable[[str], None]) -> Seen:
    """Lets clients ask: first one answer each, which compiles and is not measured, then whole turns.

    Args:
      answers: that are measured, at least; a multiple of the streams is.
    """
    compilations.count()
    zero, clients = compilations.count(), Clients(case, engine)
    finished = clients.answers()
    with waiting(f"{case.name}: compiling and warming up", say):
        list(itertools.islice(finished, case.streams))
    count = -(-answers // case.streams) * case.streams
    seen = None
    for _ in range(ATTEMPTS):
        before, start = compilations.count(), time.perf_counter()
        list(track(itertools.islice(finished, count), say, case.name, "answers", count))
        end, compiled = time.perf_counter(), compilations.count() - before
        seen = Seen(start, end, count, clients.asked, clients.steps, before - zero, compiled)
        if not compiled:
            break
    engine.reset()
    assert seen is not None, "no attempt"
    return seen


def watch_decoding(case: Case, engine: Engine) -> Clients:
    """As many streams after short prompts of text, whose answers go on when all of them are read."""
    text = min(SHORT, engine.length // 2)
    most = min(engine.length - text, CHUNKS_OF_IT * case.streams + STEPS)
    clients = Clients(dataclasses.replace(case, tile_size=0, text_tokens=text, new_tokens=most), engine)
    next(clients.answers())
    engine.reset()
    return clients
