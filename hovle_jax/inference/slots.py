"""What an engine keeps on the devices: caches of a fixed number of slots, and the programs that fill and read them.

A slot is the place of one request. Prompts are read in chunks, one request at a time: all of it by the embedding's
layers, then by the LLM's, because HD's two streams differ in length. Decoding makes one token for every slot at once.

Layers are written out, each with parameters and caches of its own: a loop would copy them in and out at every step, and
decoding is bound by what it reads.

Dimension letters: B slots, T tokens of a chunk, S capacity, D width, V vocabulary, W stop ids.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hovle_jax.inference.caches import All, LayerSlots, One
from hovle_jax.inference.calibration import input_sizes
from hovle_jax.inference.layer import LayerWeights, normalized, run_layer
from hovle_jax.inference.sampling import GREEDY, SamplingRows, draw, most_likely, penalized
from hovle_jax.inference.weights import head_of
from hovle_jax.model.config import StackConfig
from hovle_jax.model.hovle import PADDING_LOGIT, HoVLE
from hovle_jax.model.rotary import needs_lengths, rotary_angles
from hovle_jax.model.vision import pixel_shuffle

STOPS = 8  # stop ids that a request can have
MOST_TOPS = 20  # most likely tokens that are told of a place
NOWHERE = -1


@flax.struct.dataclass
class Slots:
    """What is known of all requests.

    Attributes:
      embedding, llm: a `LayerSlots` for each layer of the two stacks.
      embedding_length, length: [B] int32: how many tokens of each stream have been read.
      outputs: [S + T, D]: what the embedding's layers gave for the prompt that is being read.
      token: [B] int32: made last, and read next.
      left: [B] int32: tokens that a request may still make; 0 = idle.
      made: [B] int32: tokens that it has made.
      seen: [B, V] bool: the tokens that it has read or made.
      sampling: how its tokens are chosen.
      stops: [B, W] int32: the ids that end it; `NOWHERE` for none.
      tells_tops: [B] bool: whether it wants to know the most likely tokens of each place.
    """

    embedding: tuple[LayerSlots, ...]
    llm: tuple[LayerSlots, ...]
    embedding_length: jax.Array
    length: jax.Array
    outputs: jax.Array
    token: jax.Array
    left: jax.Array
    made: jax.Array
    seen: jax.Array
    sampling: SamplingRows
    stops: jax.Array
    tells_tops: jax.Array

    @classmethod
    def empty(cls, hovle: HoVLE, slots: int, capacity: int, long_capacity: int, chunk: int, cache: str = "") -> "Slots":
        """Idle slots.

        Args:
          capacity, long_capacity: S of the LLM's stream and of the embedding's, which a prompt with its answer fits.
          chunk: the most tokens of a chunk; the last one of a prompt is padded.
          cache: of `caches.KINDS`.
        """
        c, dtype = hovle.config, hovle.execution.dtype
        embedding = c.embedding.stack if c.embedding else None

        def layers(stack, room):
            return tuple(LayerSlots.empty(stack, slots, room + chunk, dtype, cache) for _ in range(stack.num_layers))

        zeros = lambda: jnp.zeros(slots, jnp.int32)
        sampling = jax.tree.map(jnp.asarray, SamplingRows.of([GREEDY] * slots))
        return cls(
            embedding=layers(embedding, long_capacity) if embedding else (),
            llm=layers(c.llm.stack, capacity),
            embedding_length=zeros(),
            length=zeros(),
            outputs=jnp.zeros((long_capacity + chunk if embedding else 0, c.llm.stack.width), dtype),
            token=zeros(),
            left=zeros(),
            made=zeros(),
            seen=jnp.zeros((slots, c.llm.table_rows), bool),
            sampling=sampling,
            stops=jnp.full((slots, STOPS), NOWHERE, jnp.int32),
            tells_tops=jnp.zeros(slots, bool),
        )


def fused(params: dict, hovle: HoVLE, int8: bool = False, consume: bool = False) -> dict:
    """Parameters {'embedding', 'llm'} as the programs here take them.

    'embedding' and 'llm' without their layers are in the compute type, as the modules would convert them at every step;
    'layers' {'embedding', 'llm'} are `LayerWeights`, and 'head' is the LLM's; these two in int8 where it is asked for.

    Args:
      consume: the parameters given are deleted where they were read, so that memory holds the weights about once.
    """
    c, dtype = hovle.config, jnp.dtype(hovle.execution.dtype)
    stacks = {"embedding": c.embedding.stack if c.embedding else None, "llm": c.llm.stack}

    inputs = input_sizes(params, hovle=hovle) if int8 else {}

    def layers(name, count):
        if not count:
            return []
        return LayerWeights.of_stack(params[name]["stack"]["layers"], count, dtype, inputs.get(name), consume)

    rest = lambda tree: {key: value for key, value in tree.items() if key not in ("stack", "head")}
    held = {name: jax.tree.map(lambda leaf: leaf.astype(dtype), rest(params[name])) for name in stacks if stacks[name]}
    llm = params["llm"]
    table = held["llm"]["token_embedding"]["embedding"] if c.llm.tied else llm["head"]["kernel"].T
    made = {name: layers(name, stack.num_layers) for name, stack in stacks.items() if stack}
    return held | {"layers": made, "head": head_of(table, dtype, int8)}


def _run(config: StackConfig, execution, layers, x, positions, caches, where, text_length, only=None):
    """The layers of a stack over x [B, T, D] -> (x, caches).

    `text_length`: see `rotary.needs_lengths`; `only`: of the last layer, see `run_layer`.
    """
    capacity = caches[0].capacity if caches else 0
    lengths = jnp.broadcast_to(text_length, positions.shape) if needs_lengths(config, capacity) else None
    angles = jax.lax.optimization_barrier(rotary_angles(positions, config, lengths))
    x, written = x.astype(execution.dtype), []
    for i, (weights, cache) in enumerate(zip(layers, caches, strict=True), 1):
        x, cache = run_layer(config, execution, weights, x, cache, angles, where, only if i == len(layers) else None)
        written.append(cache)
    return x, tuple(written)


def _logits(params, hovle, x):
    """Hidden states [B, D] before the final norm -> float32 [B, V]."""
    c = hovle.config.llm
    logits = params["head"](normalized(x, params["llm"]["norm"]["scale"], c.stack.norm_eps)).astype(jnp.float32)
    return jnp.where(jnp.arange(logits.shape[-1]) < c.vocab_size, logits, PADDING_LOGIT)


def _bound(params: dict, hovle: HoVLE):
    """-> (the embedding or None, the LLM), ready to be called; their stacks are run by `_run`."""
    embedding = hovle.embedding.bind({"params": params["embedding"]}) if hovle.config.embedding else None
    return embedding, hovle.llm.bind({"params": params["llm"]})


@functools.partial(jax.jit, static_argnames="hovle")
def visual_inputs(params: dict, tiles: jax.Array, *, hovle: HoVLE) -> jax.Array:
    """Tiles [M, S, S, 3] uint8 -> what the embedding's layers read of them, [M * P, D]."""
    embedding, _ = _bound(params, hovle)
    return embedding.embed_tiles(tiles[None])[0]


@functools.partial(jax.jit, static_argnames="hovle")
def visual_outputs(params: dict, outputs: jax.Array, starts: jax.Array, *, hovle: HoVLE) -> jax.Array:
    """HD: what the LLM reads of tiles, [M * P, D], from `Slots.outputs`, where they begin at `starts` [M]."""
    embedding, _ = _bound(params, hovle)
    places = starts[:, None] + jnp.arange(hovle.config.embedding.stack_tokens_per_tile)
    shuffled = embedding.pixel_shuffle_projection(pixel_shuffle(jnp.take(outputs, places, axis=0)))
    return shuffled.reshape(-1, outputs.shape[-1])


@functools.partial(jax.jit, static_argnames="count")
def window(vectors: jax.Array, start: jax.Array, *, count: int) -> jax.Array:
    """`count` rows of vectors [n, D] from `start` on, wherever that is; rows that are not there repeat the last one."""
    return jnp.take(vectors, start + jnp.arange(count), axis=0, mode="clip")


@functools.partial(jax.jit, donate_argnames="slots")
def begin(
    slots: Slots,
    slot: jax.Array,
    lengths: jax.Array,
    seen: jax.Array,
    request: SamplingRows,
    stops: jax.Array,
    tells_tops: jax.Array,
) -> Slots:
    """Gives a slot to a request.

    Args:
      slot: int32 scalar.
      lengths: [2] int32: how much of the embedding's stream and of the LLM's the slot has read already.
      seen: [V] bool: the tokens of its prompt.
      request: one row.
      stops: [W] int32.
      tells_tops: bool scalar.
    """
    return dataclasses.replace(
        slots,
        embedding_length=slots.embedding_length.at[slot].set(lengths[0]),
        length=slots.length.at[slot].set(lengths[1]),
        left=slots.left.at[slot].set(0),
        made=slots.made.at[slot].set(0),
        seen=slots.seen.at[slot].set(seen),
        sampling=slots.sampling.at(slot, request),
        stops=slots.stops.at[slot].set(stops),
        tells_tops=slots.tells_tops.at[slot].set(tells_tops),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def end(slots: Slots, slot: jax.Array) -> Slots:
    """Takes a slot from its request, which makes no further token."""
    return dataclasses.replace(slots, left=slots.left.at[slot].set(0))


@flax.struct.dataclass
class Chunk:
    """Tokens of a prompt that are read at once.

    Attributes: arrays of the host or the device.
      tokens: [T] int32, padded.
      visual: [T] int32: the row of the chunk's visual vectors that stands in a token's place; `NOWHERE` for text.
      text: [T] int32: the row of `Slots.outputs` that a text token is read from; of the LLM's chunks alone.
      count: int32 scalar: tokens that are no padding.
      text_length: int32 scalar: how long the whole prompt is in this stream.
    """

    tokens: Any
    visual: Any
    text: Any
    count: Any
    text_length: Any


@functools.partial(jax.jit, static_argnames=("hovle", "reach"), donate_argnames="slots")
def read_embedding(
    params: dict, slots: Slots, slot: jax.Array, chunk: Chunk, vectors: Any, *, hovle: HoVLE, reach: int
) -> Slots:
    """The embedding's layers read a chunk; their outputs are kept for `read_llm`.

    Args:
      vectors: [T, D] of `visual_inputs`, or None where the chunk is text alone.
      reach: static; tokens of the slot, those of the chunk with its padding included, and possibly more.
    """
    embedding, _ = _bound(params, hovle)
    x = _placed(embedding.embed_text(chunk.tokens), vectors, chunk)
    start = slots.embedding_length[slot]
    positions = start + jnp.arange(len(chunk.tokens), dtype=jnp.int32)
    x, caches = _run(
        hovle.config.embedding.stack, hovle.execution, params["layers"]["embedding"], x[None], positions[None],
        slots.embedding, One(slot, start, reach), chunk.text_length,
    )  # fmt: skip
    outputs = jax.lax.dynamic_update_slice(slots.outputs, x[0].astype(slots.outputs.dtype), (start, 0))
    length = slots.embedding_length.at[slot].add(chunk.count)
    return dataclasses.replace(slots, embedding=caches, outputs=outputs, embedding_length=length)


def _placed(text, vectors, chunk):
    """Visual vectors in the places that are theirs."""
    if vectors is None:
        return text
    visual = jnp.take(vectors, jnp.maximum(chunk.visual, 0), axis=0).astype(text.dtype)
    return jnp.where((chunk.visual >= 0)[:, None], visual, text)


@flax.struct.dataclass
class Made:
    """The token that each row made. Log-probabilities are the model's own, before penalty, temperature and filters.

    Attributes:
      token, logprob: [B].
      is_new: [B] bool: whether it made one.
      tops: ([B, `MOST_TOPS`] tokens, the most likely first, and their log-probabilities), which mean something where a
        row wants them; None of a program that knows none.
    """

    token: jax.Array
    logprob: jax.Array
    is_new: jax.Array
    tops: tuple[jax.Array, jax.Array] | None


@functools.partial(jax.jit, static_argnames=("hovle", "reach"), donate_argnames="slots")
def read_llm(
    params: dict,
    slots: Slots,
    slot: jax.Array,
    chunk: Chunk,
    vectors: Any,
    most: jax.Array,
    *,
    hovle: HoVLE,
    reach: int,
) -> tuple[Slots, Made]:
    """The LLM reads a chunk of what `read_embedding` gave, or of tokens where there is no embedding.

    Args:
      vectors: HD: [T, D] of `visual_outputs`, or None where the chunk is text alone.
      most: int32 scalar: after a prompt's last chunk the most tokens of the answer, of which the first is made here;
        else 0.
      reach: see `read_embedding`.
    Returns:
      (slots, Made of one row).
    """
    c, (embedding, llm) = hovle.config.llm, _bound(params, hovle)
    if embedding is None:
        x = llm.token_embedding(chunk.tokens)
    else:
        x = embedding.for_llm(_placed(jnp.take(slots.outputs, chunk.text, axis=0), vectors, chunk))
    start = slots.length[slot]
    positions = start + jnp.arange(len(chunk.tokens), dtype=jnp.int32)
    x, caches = _run(
        hovle.config.llm.stack, hovle.execution, params["layers"]["llm"], x[None], positions[None], slots.llm,
        One(slot, start, reach), chunk.text_length, only=chunk.count - 1,
    )  # fmt: skip
    # The head is read after a prompt's last chunk alone.
    unread = jnp.zeros((1, c.table_rows), jnp.float32)
    logits = jax.lax.cond(most > 0, lambda: _logits(params, hovle, x[:, 0]), lambda: unread)
    slots = dataclasses.replace(slots, llm=caches, length=slots.length.at[slot].add(chunk.count))
    rows = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1)
    token, made = _choose(
        logits, rows(slots.seen), jax.tree.map(rows, slots.sampling), rows(slots.made), most > 0, rows(slots.tells_tops)
    )
    left = jnp.where(jnp.any(token[0] == slots.stops[slot]), 0, jnp.maximum(most - 1, 0))
    slots = dataclasses.replace(
        slots,
        token=slots.token.at[slot].set(token[0]),
        left=slots.left.at[slot].set(left),
        made=slots.made.at[slot].add(most > 0),
        seen=slots.seen.at[slot, token[0]].max(most > 0),
    )
    return slots, made


def _choose(logits, seen, sampling, index, is_new, tells_tops, plain=False):
    """`plain`: static: no row is sampled, penalized or tells tops: the most likely token is all there is to find."""
    token, highest = most_likely(logits)
    logsumexp = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1))
    tops = None
    if not plain:
        tops = _tops(logits, logsumexp, is_new & tells_tops)
        token = draw(penalized(logits, seen, sampling.repetition_penalty), sampling, index)
        highest = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, Made(token, highest - logsumexp, jnp.broadcast_to(is_new, token.shape), tops)


def _tops(logits, logsumexp, is_wanted):
    """See `Made.tops`; found only where a row wants them, so that those who sample without do not pay for it."""
    count = min(MOST_TOPS, logits.shape[-1])
    none = jnp.zeros((len(logits), count), jnp.int32), jnp.zeros((len(logits), count), logits.dtype)

    def found():
        values, tokens = jax.lax.top_k(logits, count)
        return tokens.astype(jnp.int32), values - logsumexp[:, None]

    return jax.lax.cond(jnp.any(is_wanted), found, lambda: none)


@functools.partial(jax.jit, static_argnames=("hovle", "reaches", "plain"), donate_argnames="slots")
def decode(
    params: dict, slots: Slots, *, hovle: HoVLE, reaches: tuple[int, int], plain: bool = False
) -> tuple[Slots, Made]:
    """Every slot reads its last token and makes another; idle ones are computed and forgotten.

    Args:
      reaches: static; the most tokens that an active slot has of the embedding's stream and of the LLM's, or more.
      plain: static; every active slot takes the most likely token, unpenalized, and tells no others.
    """
    embedding, llm = _bound(params, hovle)
    tokens, active = slots.token[:, None], slots.left > 0
    caches = ()
    if embedding is None:
        x = llm.token_embedding(tokens)
    else:
        start = slots.embedding_length
        x, caches = _run(
            hovle.config.embedding.stack, hovle.execution, params["layers"]["embedding"], embedding.embed_text(tokens),
            start[:, None], slots.embedding, All(start, reaches[0]), start[:, None] + 1,
        )  # fmt: skip
        x = embedding.for_llm(x)
    start = slots.length
    x, llm_caches = _run(
        hovle.config.llm.stack, hovle.execution, params["layers"]["llm"], x, start[:, None], slots.llm,
        All(start, reaches[1]), start[:, None] + 1,
    )  # fmt: skip
    token, made = _choose(
        _logits(params, hovle, x[:, 0]), slots.seen, slots.sampling, slots.made, active, slots.tells_tops, plain
    )
    is_stop = jnp.any(token[:, None] == slots.stops, axis=1)
    return dataclasses.replace(
        slots,
        embedding=caches,
        llm=llm_caches,
        embedding_length=slots.embedding_length + active,
        length=slots.length + active,
        token=jnp.where(active, token, slots.token),
        left=jnp.where(active & ~is_stop, slots.left - 1, 0),
        made=slots.made + active,
        seen=slots.seen.at[jnp.arange(len(token)), token].max(active),
    ), made
