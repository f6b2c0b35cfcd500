"""Compiles what requests will need before the first one comes, so that none of them waits for a compiler."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from hovle_jax.inference import slots as programs
from hovle_jax.inference.engine import AHEAD, REACHES, Engine, Request, Stream, padded_tiles
from hovle_jax.inference.reading import Reading
from hovle_jax.inference.texts import TextSoFar
from hovle_jax.system import compilations


@dataclasses.dataclass(frozen=True)
class Warmed:
    """What `warm_up` did: how many programs were compiled, and for prompts of how many tokens with their answers."""

    programs: int
    length: int


def warm_up(engine: Engine, length: int | None = None, is_over: Callable[[], bool] = lambda: False) -> Warmed:
    """Runs each program once that requests up to a length can need; the engine must be idle and forgets its caches.

    Which programs there are follows from the sizes that an engine pads to: of chunks, of tiles, and of how much of the
    caches is looked at. What they compute here means nothing.

    Args:
      length: the most tokens of a prompt with its answer; None = as many as the engine was made for. Longer requests
        are answered too, and compile what they need.
      is_over: asked after each program; true = the others are left out.
    """
    compilations.count()
    before = compilations.count()
    length = min(length or engine.length, engine.length)
    for _ in _Warming(engine, length).steps():
        if is_over():
            engine.reset()
            break
    return Warmed(compilations.count() - before, length)


class _Warming:
    """The programs of an engine, by what they depend on. It is the engine's other half and reaches into it."""

    def __init__(self, engine: Engine, length: int):
        self._engine, self._length = engine, length
        self._hovle, self._sizes, self._is_hd = engine._hovle, engine._chunks, engine._is_hd
        self._embedding = self._hovle.config.embedding
        self._vectors = None  # of some tiles, where the model sees any
        self._more = 0  # tokens that the embedding's stream has beyond the LLM's, for a tile
        if self._embedding is not None:
            self._more = self._embedding.stack_tokens_per_tile - self._embedding.tokens_per_tile

    def steps(self) -> Iterator[None]:
        """Runs one after another."""
        for _ in range(2):  # the second one begins with caches that programs have made
            yield self._smallest_request()
        for count in self._tile_counts():
            yield self._see(count)
        for size in self._sizes:
            yield from self._read_embedding(size)
            yield from self._read_llm(size)
        for reaches, plain in itertools.product(sorted(set(self._decode_reaches())), (True, False)):
            self._engine._state, _ = programs.decode(
                self._engine.params, self._engine._state, hovle=self._hovle, reaches=reaches, plain=plain
            )
            yield
        self._engine.reset()
        # New caches lie elsewhere than those that programs have made, so what comes first is compiled for both.
        yield self._smallest_request()

    def _smallest_request(self):
        """What begins and ends a request."""
        text = TextSoFar(self._engine._answerer.tokenizer)
        reading = Reading.of_text(np.zeros(1, np.int32))
        self._engine.enqueue(Stream(reading, Request(2), (), text, lambda piece: None))
        self._engine.run()

    # -- tiles

    def _see(self, count):
        """So many tiles at once; their vectors are cut into chunks."""
        self._vectors = self._visual_inputs(count)
        self._windows(self._vectors)
        if self._is_hd:
            starts = np.zeros(count, np.int32)
            outputs = self._engine._state.outputs
            self._windows(programs.visual_outputs(self._engine.params, outputs, starts, hovle=self._hovle))

    def _tile_counts(self):
        return sorted({padded_tiles(count) for count in range(1, self._most_tiles(self._length) + 1)})

    def _most_tiles(self, length):
        if self._embedding is None:
            return 0
        fits = length // self._embedding.tokens_per_tile
        return min(fits, self._engine._tiles) if self._is_hd else fits

    def _visual_inputs(self, count):
        side = self._embedding.tile_size
        tiles = np.zeros((count, side, side, 3), np.uint8)
        return programs.visual_inputs(self._engine.params, tiles, hovle=self._hovle)

    def _windows(self, vectors):
        for size in self._sizes:
            programs.window(vectors, np.int32(0), count=size)

    # -- chunks

    def _read_embedding(self, size):
        """A chunk of the embedding's stream, with and without images, for all that it may look at."""
        if self._embedding is None:
            return
        longest = self._length + self._more * self._most_tiles(self._length)
        _, chunk = next(_text(size).embedding_chunks(0, (size,)))
        for reach in self._reaches(self._engine._state.embedding, size, longest + size):
            for here in _with_and_without(self._vectors, size):
                self._engine._state = programs.read_embedding(
                    self._engine.params, self._engine._state, np.int32(0), chunk, here, hovle=self._hovle, reach=reach
                )
                yield

    def _read_llm(self, size):
        """The same of the LLM's stream, which has visual vectors of its own in HD alone."""
        _, chunk = next(_text(size).llm_chunks(0, (size,)))
        for reach in self._reaches(self._engine._state.llm, size, self._length + size):
            for here in _with_and_without(self._vectors if self._is_hd else None, size):
                self._engine._state, _ = programs.read_llm(
                    self._engine.params, self._engine._state, np.int32(0), chunk, here, np.int32(0),
                    hovle=self._hovle, reach=reach,
                )  # fmt: skip
                yield

    def _reaches(self, layers, least, most):
        """What a program may look at: the sizes of `engine.REACHES` for so many tokens."""
        bounds = [least, *(size + 1 for size in REACHES if least < size + 1 <= most)]
        return sorted({self._engine._reach(layers, tokens) for tokens in bounds})

    def _decode_reaches(self):
        """Pairs for the two streams; in HD one token of the LLM's may be several of the embedding's."""
        state = self._engine._state
        for tokens in range(1, self._length + AHEAD + 1):
            longest = tokens + self._more * self._most_tiles(tokens)
            short = self._engine._reach(state.llm, tokens)
            yield from ((long, short) for long in self._reaches(state.embedding, tokens, longest))


def _text(size):
    return Reading.of_text(np.zeros(size, np.int32))


def _with_and_without(vectors, size):
    yield None
    if vectors is not None:
        yield programs.window(vectors, np.int32(0), count=size)
