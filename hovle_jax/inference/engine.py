"""An engine that answers many requests at once: each has a slot, and every step makes a token for all of them.

engine = Engine(answerer, slots=8, length=1024)
streams = [engine.submit(prompt, Request(max_new_tokens=32)) for prompt in prompts]
engine.run()
print([stream.text for stream in streams])
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.inference import slots as programs
from hovle_jax.inference.caches import kind_for
from hovle_jax.inference.generate import Answerer, Prompt, prompt_samples, row_shape
from hovle_jax.inference.limits import check_lengths
from hovle_jax.inference.memory import SLOTS, Budget, gigabytes, size
from hovle_jax.inference.reading import Reading
from hovle_jax.inference.sampling import GREEDY, Sampling, SamplingRows
from hovle_jax.inference.slots import MOST_TOPS, NOWHERE, STOPS, Slots
from hovle_jax.inference.texts import TextSoFar
from hovle_jax.inference.weights import is_int8
from hovle_jax.model.hovle import HoVLE
from hovle_jax.system.memory import free_on

CHUNKS = (16, 64, 256)  # lengths that a prompt is read in; the rest is padded to the smallest that holds it
TILES = (1, 2, 4, 8, 16)  # tiles that are embedded at once, padded likewise; beyond, to a multiple of the last
REACHES = tuple(128 << n for n in range(16))  # how much of the caches is looked at
AHEAD = 2  # tokens beyond those that the host has seen: one that the devices may have made, and the next


@dataclasses.dataclass(frozen=True)
class Request:
    """How one prompt is to be answered.

    Attributes:
      max_new_tokens: the longest answer.
      sampling: how its tokens are chosen.
      stops: texts that end it; they are not part of it.
      stop_ids: tokens that end it, beside the tokenizer's own.
      top_logprobs: how many of the most likely tokens at each place are told, up to `slots.MOST_TOPS`.
      may_be_shorter: where the prompt leaves less room than `max_new_tokens`, the answer has only that.
    """

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    may_be_shorter: bool = False

    def __post_init__(self):
        if not 0 <= self.top_logprobs <= MOST_TOPS:
            raise UserError(f"top_logprobs={self.top_logprobs}: from 0 to {MOST_TOPS}")

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is all that it wants to know."""
        return self.sampling.is_greedy and not self.top_logprobs


class Stream:
    """An answer that is being made.

    Attributes:
      tokens, logprobs: those made so far, the one that ended it included.
      tops: at each of their places the most likely tokens with their log-probabilities, as many as were asked for.
      finish: '' while it is made, then 'stop', 'length' or 'cancelled'.
      reused: tokens of the prompt that an earlier request had left in the slot.
    """

    def __init__(self, reading: Reading, request: Request, stop_ids: tuple[int, ...], text: TextSoFar, listener):
        self.reading, self.request, self.stop_ids = reading, request, stop_ids
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[tuple[tuple[int, float], ...]] = []
        self.finish, self.reused = "", 0
        self._text, self._listener = text, listener

    @property
    def text(self) -> str:
        return self._text.text

    def take(self, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> None:
        """One more token; `top`: see `tops`."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.tops.append(top)
        piece = "" if token in self.stop_ids else self._text.add(token)
        if token in self.stop_ids or self._text.is_stopped:
            self.close("stop", piece)
        elif len(self.tokens) == self.request.max_new_tokens:
            self.close("length", piece)
        elif piece:
            self._listener(piece)

    def close(self, finish: str, piece: str = "") -> None:
        """The answer is complete."""
        self.finish = finish
        piece += self._text.end()
        if piece:
            self._listener(piece)


@dataclasses.dataclass
class Slot:
    """The host's view of a slot.

    Attributes:
      stream: whose it is; None = free.
      identity: what its caches hold, as `Reading.identity`.
      used: when it was last given away; the free slot that was used longest ago is given first.
    """

    stream: Stream | None = None
    identity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0


def empty_slots(
    hovle: HoVLE, slots: int, length: int, tiles: int | None = None, chunk: int = CHUNKS[-1], cache: str = ""
) -> Slots:
    """Caches and all else that an engine keeps of requests; arguments as those of `Engine`, `chunk` the longest one."""
    embedding = hovle.config.embedding
    if embedding is None:
        return Slots.empty(hovle, slots, length, length, chunk, cache)
    tiles = length // embedding.tokens_per_tile if tiles is None else tiles
    more = tiles * (embedding.stack_tokens_per_tile - embedding.tokens_per_tile)
    return Slots.empty(hovle, slots, length, length + more, chunk, cache)


def slots_bytes(*arguments: Any, **more: Any) -> int:
    """What `empty_slots` takes of the memory; makes nothing."""
    return size(jax.eval_shape(lambda: empty_slots(*arguments, **more)))


class Engine:
    """See the module's docstring. Not thread-safe: one thread calls it.

    Attributes:
      num_slots: requests that are answered at once.
      params: as its programs take them (see `slots.fused`).

    Args:
      slots: that number.
      length: the most tokens of a prompt with its answer, as the LLM reads them.
      tiles: HD: the most tiles of a prompt, which make the embedding's caches longer; None = those that fit.
      chunks: see `CHUNKS`.
      params: as `slots.fused` makes them, in int8 too; None = of the answerer's.
      cache: of keys and values: 'bfloat16', 'int8', or empty = in the compute type, for weights in int8 in bfloat16.
    Raises:
      UserError: there is no room for the caches.
    """

    def __init__(
        self,
        answerer: Answerer,
        slots: int = SLOTS,
        length: int = 1024,
        tiles: int | None = None,
        chunks: Sequence[int] = CHUNKS,
        params: dict | None = None,
        cache: str = "",
    ):
        self._answerer, self._hovle = answerer, answerer.hovle
        embedding = self._hovle.config.embedding
        self._length, self._chunks = length, tuple(chunks)
        self._tiles = (length // embedding.tokens_per_tile if embedding else 0) if tiles is None else tiles
        self.params = programs.fused(answerer.params, self._hovle) if params is None else params
        cache = kind_for(cache, is_int8(self.params))
        taken = lambda slots, length: slots_bytes(self._hovle, slots, length, tiles, chunks[-1], cache)
        self.num_slots = Budget(free_on(jax.local_devices()), taken).slots(slots, length)
        self._empty = lambda: empty_slots(self._hovle, self.num_slots, length, tiles, chunks[-1], cache)
        self.reset()

    def reset(self) -> None:
        """Forgets all requests and what the caches hold."""
        self.__dict__.pop("_state", None)  # before the new ones, as there may be no room for both
        self._state = self._empty()
        self._slots = [Slot() for _ in range(self.num_slots)]
        self._waiting: collections.deque[Stream] = collections.deque()
        self._reading: tuple[int, Iterator[bool]] | None = None  # (slot, the rest of its chunks)
        # ([(row, slot, stream)], Made) that the host has not looked at yet.
        self._made: collections.deque = collections.deque()
        self._clock = itertools.count(1)

    def memory(self) -> str:
        """What it takes, and what it leaves, in words."""
        caches, free = size((self._state.embedding, self._state.llm)), free_on(jax.local_devices())
        left = "" if free is None else f"; {gigabytes(free)} of memory are left"
        return (
            f"{gigabytes(size(self.params))} of weights; {self.num_slots} answers at once of {self._length:,} tokens "
            f"each with their prompts: {gigabytes(caches)} of caches, {caches / 1e6 / self.num_slots:.0f} MB an "
            f"answer{left}"
        )

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return sum(slot.stream is None for slot in self._slots)

    # -- what is asked

    def submit(
        self, prompt: Prompt, request: Request = Request(), listener: Callable[[str], None] = lambda piece: None
    ) -> Stream:
        """Queues a prompt; see `prepare`."""
        return self.enqueue(self.prepare(prompt, request, listener))

    def prepare(
        self,
        prompt: Prompt,
        request: Request = Request(),
        listener: Callable[[str], None] = lambda piece: None,
    ) -> Stream:
        """Tokens and tiles of a prompt, to be queued; changes nothing, so any thread may call it.

        Args:
          listener: called with each piece of the answer's text.
        Raises:
          UserError: marks and images disagree, or it is too long.
        """
        (sample,) = prompt_samples(self._answerer, [prompt])
        n, tiles = len(sample.tokens), len(sample.tiles)
        if request.may_be_shorter:
            most = max(1, min(request.max_new_tokens, self._length - n))
            request = dataclasses.replace(request, max_new_tokens=most)
        check_lengths(self._hovle.config.llm, n, request.max_new_tokens, tiles)
        if n + request.max_new_tokens > self._length or tiles > self._tiles and self._is_hd:
            raise UserError(self._too_long(n, tiles, request.max_new_tokens))
        stop_ids = tuple(dict.fromkeys((*self._answerer.tokenizer.stop_ids, *request.stop_ids)))
        if len(stop_ids) > STOPS:
            raise UserError(f"{len(stop_ids)} stop ids, the tokenizer's included: at most {STOPS} are possible")
        text = TextSoFar(self._answerer.tokenizer, request.stops)
        return Stream(self._read(sample), request, stop_ids, text, listener)

    def another(
        self, stream: Stream, sampling: Sampling, listener: Callable[[str], None] = lambda piece: None
    ) -> Stream:
        """A second answer to what `prepare` gave, otherwise drawn, to be queued too."""
        request = dataclasses.replace(stream.request, sampling=sampling)
        text = TextSoFar(self._answerer.tokenizer, request.stops)
        return Stream(stream.reading, request, stream.stop_ids, text, listener)

    def _too_long(self, tokens, tiles, new):
        of_tiles = f", those of {tiles} tile{'s' * (tiles != 1)} included," if tiles else ""
        room = f"{self._length:,} tokens" + (f" and {self._tiles} tiles" if self._is_hd else "")
        return (
            f"the prompt has {tokens:,} tokens{of_tiles} and its answer may have {new:,}: the engine was made for "
            f"{room}; ask for less, or give it a greater length"
        )

    def enqueue(self, stream: Stream) -> Stream:
        """Queues what `prepare` gave."""
        self._waiting.append(stream)
        return stream

    @property
    def length(self) -> int:
        """The most tokens of a prompt with its answer."""
        return self._length

    @property
    def answerer(self) -> Answerer:
        """The model that it was made of."""
        return self._answerer

    @property
    def _is_hd(self):
        embedding = self._hovle.config.embedding
        return embedding is not None and embedding.pixel_shuffle == "post"

    def _read(self, sample):
        if self._hovle.config.embedding is None:
            return Reading.of_text(sample.tokens)
        return Reading.of(sample, row_shape(self._answerer, len(sample.tokens), len(sample.tiles)))

    def cancel(self, stream: Stream) -> None:
        """Ends an answer; its slot is free for the next request."""
        if stream.finish:
            return
        stream.close("cancelled")
        if stream in self._waiting:
            self._waiting.remove(stream)
        for index, slot in enumerate(self._slots):
            if slot.stream is stream:
                if self._reading and self._reading[0] == index:
                    self._reading = None
                self._free(index)

    # -- what is done

    def run(self) -> None:
        """Answers all that was asked."""
        while self.step(prompts_first=True):
            pass

    def step(self, prompts_first: bool = False) -> bool:
        """One chunk of a prompt, if one is to be read, and one token for all that are being answered.

        The host looks at the tokens of a step while the devices do the next one. Returns whether anything is left.

        Args:
          prompts_first: all chunks for which there are slots, so that more answers share the steps after: all are done
            sooner, while those that have begun wait.
        """
        self._admit()
        self._read_chunk()
        while prompts_first and self._reads():
            self._admit()
            self._read_chunk()
        answering = {i: s.stream for i, s in enumerate(self._slots) if s.stream and not self._is_reading(i)}
        if answering:
            plain = all(stream.request.is_plain for stream in answering.values())
            self._state, made = programs.decode(
                self.params, self._state, hovle=self._hovle, reaches=self._reaches(answering.values()), plain=plain
            )
            self._await([(index, index, stream) for index, stream in answering.items()], made)
        while self._made and (len(self._made) > 1 or not answering):
            self._take(*self._made.popleft())
        return bool(self._waiting or self._made or any(slot.stream for slot in self._slots))

    def _await(self, rows, made):
        """Has tokens sent to the host, which looks at them later."""
        for leaf in jax.tree.leaves(made):
            leaf.copy_to_host_async()
        self._made.append((rows, made))

    def _reaches(self, answering):
        """How much of the caches of the two stacks the next step looks at."""
        made = AHEAD + max(len(stream.tokens) for stream in answering)
        long, short = (max(getattr(s.reading, name) for s in answering) + made for name in ("long_length", "length"))
        return self._reach(self._state.embedding, long), self._reach(self._state.llm, short)

    def _reach(self, layers, tokens):
        """The next of few sizes, as each is a program of its own; no more than there is."""
        capacity = layers[0].capacity if layers else 0
        size = next((size for size in REACHES if size >= tokens), capacity)
        return size if size < 0.75 * capacity else capacity  # a part may be copied before it is read

    def _reads(self):
        """Whether a chunk of a prompt can be read."""
        return self._reading is not None or (bool(self._waiting) and any(slot.stream is None for slot in self._slots))

    def _is_reading(self, index):
        return self._reading is not None and self._reading[0] == index

    def _admit(self):
        """Gives a free slot to the next request: the one that holds most of its prompt, else that used longest ago."""
        free = [i for i, slot in enumerate(self._slots) if slot.stream is None]
        if self._reading is not None or not self._waiting or not free:
            return
        stream = self._waiting.popleft()
        reading = stream.reading
        shared = {i: reading.shared(self._slots[i].identity, self._tokens_per_tile) for i in free}
        index = max(free, key=lambda i: (shared[i], -self._slots[i].used))
        stream.reused = shared[index] if self._can_reuse else 0
        self._slots[index] = Slot(stream, reading.identity[:0], next(self._clock))
        self._begin(index, stream)
        self._reading = index, self._programs(index, stream)

    @property
    def _can_reuse(self):
        """With dynamic NTK keys belong to the length of the text that they were read in."""
        stacks = [part.stack for part in (self._hovle.config.embedding, self._hovle.config.llm) if part]
        return not any(stack.rope_scaling and stack.rope_scaling.kind == "dynamic" for stack in stacks)

    @property
    def _tokens_per_tile(self):
        return self._hovle.config.embedding.tokens_per_tile if self._hovle.config.embedding else 1

    def _begin(self, index, stream):
        seen = np.zeros(self._state.seen.shape[1], bool)
        seen[stream.reading.tokens] = True
        lengths = np.asarray([stream.reading.long_place(stream.reused), stream.reused], np.int32)
        stops = np.full(STOPS, NOWHERE, np.int32)
        stops[: len(stream.stop_ids)] = stream.stop_ids
        request = stream.request
        self._state = programs.begin(
            self._state, np.int32(index), lengths, seen, SamplingRows.of([request.sampling]), stops,
            np.bool_(request.top_logprobs > 0),
        )  # fmt: skip

    def _programs(self, index, stream):
        """Reads a prompt: a generator that stops after each chunk and says whether it was the last."""
        reading, hovle, slot = stream.reading, self._hovle, np.int32(index)
        embedding, vectors = hovle.config.embedding, None
        start = reading.long_place(stream.reused)
        if embedding is not None:
            if (reading.visual[start:] >= 0).any():
                vectors = self._visual_inputs(reading)
            for first, chunk in reading.embedding_chunks(start, self._chunks):
                here = self._window(vectors, first, chunk)
                reach = self._reach(self._state.embedding, start + len(chunk.tokens))
                self._state = programs.read_embedding(
                    self.params, self._state, slot, chunk, here, hovle=hovle, reach=reach
                )
                start += int(chunk.count)
                yield False
            if self._is_hd and vectors is not None:
                vectors = self._visual_outputs(reading)
        if not self._is_hd:
            vectors = None
        chunks, start = list(reading.llm_chunks(stream.reused, self._chunks)), stream.reused
        for number, (first, chunk) in enumerate(chunks, 1):
            most = np.int32(stream.request.max_new_tokens if number == len(chunks) else 0)
            here = self._window(vectors, first, chunk)
            reach = self._reach(self._state.llm, start + len(chunk.tokens))
            self._state, made = programs.read_llm(
                self.params, self._state, slot, chunk, here, most, hovle=hovle, reach=reach
            )
            start += int(chunk.count)
            if most:
                self._await([(0, index, stream)], made)
            yield number == len(chunks)

    def _visual_inputs(self, reading):
        tiles = _padded(reading.tiles)
        return programs.visual_inputs(self.params, tiles, hovle=self._hovle)

    def _visual_outputs(self, reading):
        starts = _padded(reading.tile_starts(self._hovle.config.embedding.stack_tokens_per_tile))
        return programs.visual_outputs(self.params, self._state.outputs, starts, hovle=self._hovle)

    def _window(self, vectors, first, chunk):
        if first == NOWHERE or vectors is None:
            return None
        return programs.window(vectors, np.int32(first), count=len(chunk.tokens))

    def _read_chunk(self):
        if self._reading is None:
            return
        index, rest = self._reading
        if next(rest):
            self._reading = None
            self._slots[index].identity = self._slots[index].stream.reading.identity

    def _take(self, rows, made):
        """The host's part of a step: tokens to their streams."""
        tokens, logprobs, is_new = (np.asarray(x) for x in (made.token, made.logprob, made.is_new))
        for row, index, stream in rows:
            if stream.finish or not is_new[row]:
                continue
            stream.take(int(tokens[row]), float(logprobs[row]), _tops(made, row, stream.request.top_logprobs))
            if stream.finish:
                self._free(index)

    def _free(self, index):
        """The slot's caches stay: a prompt that goes on from them finds them."""
        slot = self._slots[index]
        self._state = programs.end(self._state, np.int32(index))
        # The last token was made and not read.
        read = np.asarray(slot.stream.tokens[:-1], np.int64)
        slot.identity = np.concatenate([slot.identity, read]) if len(slot.identity) else slot.identity
        slot.stream = None


def _tops(made, row, count):
    """The first `count` of a row's most likely tokens, with their log-probabilities."""
    if not count:
        return ()
    tokens, logprobs = (np.asarray(column)[row, :count].tolist() for column in made.tops)
    return tuple(zip(tokens, logprobs))


def padded_tiles(count: int) -> int:
    """See `TILES`."""
    return next((n for n in TILES if n >= count), -(-count // TILES[-1]) * TILES[-1])


def _padded(rows):
    """With zeros."""
    count = padded_tiles(len(rows))
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
