"""The figures of a case, from what its clients saw."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from hovle_jax.inference.bench.cases import Case
from hovle_jax.inference.bench.clients import Seen, Step

LEAST_STEPS = 3  # of decoding alone, of which a median says something


@dataclasses.dataclass(frozen=True)
class Spread:
    """Percentiles."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(float(np.percentile(values, share)) for share in (50, 90, 99)))


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Steps that read no prompt.

    Attributes:
      seconds: of each.
      prompt_tokens: of the prompts before.
      cache_bytes: see `traffic`.
    """

    seconds: list[float]
    prompt_tokens: int
    cache_bytes: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is reported of a case.

    Attributes:
      prompt_tokens: of each request, its tile's included, as the LLM reads them.
      answers, tokens, seconds: what was completed while it was measured, and how long that took.
      first_token_seconds: from handing over tiles and tokens to the first token on the host, of requests made while it
        was measured; with several streams they wait for each other's prompts.
      between_tokens_seconds: from one token of a stream to its next.
      tokens_per_second_a_stream: after its first token, while others' prompts are read between.
      tokens_per_second: of all streams, prompts included.
      decoding_steps, decoding_seconds: steps that read no prompt, and their median; None = too few.
      decoding_prompt_tokens: of the prompts before them: short ones where the reading of others left too few steps.
      tokens_per_second_decoding: of all streams in such steps.
      weight_bytes, cache_bytes: that such a step must read (traffic.py).
      read_bandwidth: bytes a second, measured right after the case.
      share_of_bandwidth: of it, that such a step reaches.
      programs_compiled_before, programs_compiled: by the case until it was measured, and while it was.
    """

    streams: int
    tile_size: int
    text_tokens: int
    prompt_tokens: int
    new_tokens: int
    answers: int
    tokens: int
    seconds: float
    first_token_seconds: Spread
    between_tokens_seconds: Spread
    tokens_per_second_a_stream: float
    tokens_per_second: float
    decoding_steps: int
    decoding_prompt_tokens: int
    decoding_seconds: float | None
    tokens_per_second_decoding: float | None
    weight_bytes: int
    cache_bytes: float
    read_bandwidth: float
    share_of_bandwidth: float | None
    programs_compiled_before: int
    programs_compiled: int


def figures(
    case: Case, seen: Seen, prompt_tokens: int, decoding: Decoding, weight_bytes: int, read_bandwidth: float
) -> Figures:
    """Of a case."""
    between, seconds, steps = _between(seen), seen.end - seen.start, decoding.seconds
    step = statistics.median(steps) if len(steps) >= LEAST_STEPS else None
    tokens = seen.answers * case.new_tokens
    return Figures(
        **dataclasses.asdict(case),
        prompt_tokens=prompt_tokens,
        answers=seen.answers,
        tokens=tokens,
        seconds=seconds,
        first_token_seconds=Spread.of(_first(seen)),
        between_tokens_seconds=Spread.of(between),
        tokens_per_second_a_stream=1 / statistics.mean(between),
        tokens_per_second=tokens / seconds,
        decoding_steps=len(steps),
        decoding_prompt_tokens=decoding.prompt_tokens,
        decoding_seconds=step,
        tokens_per_second_decoding=case.streams / step if step else None,
        weight_bytes=weight_bytes,
        cache_bytes=decoding.cache_bytes,
        read_bandwidth=read_bandwidth,
        share_of_bandwidth=(weight_bytes + decoding.cache_bytes) / step / read_bandwidth if step else None,
        programs_compiled_before=seen.programs_before,
        programs_compiled=seen.programs,
    )


def decoding_steps(steps: Iterable[Step]) -> list[tuple[float, int]]:
    """(seconds, tokens of the longest answer) of the steps in which neither they nor the one before read a prompt.

    The host sees a step's tokens while the next one is made, so that the first after a prompt still waits for it.
    """
    pairs = itertools.pairwise(steps)
    return [(b.end - a.end, b.longest) for a, b in pairs if a.is_alone and b.is_alone and b.longest > a.longest]


def _first(seen):
    """Of requests made in time whose first token came in time: in a whole turn there is one."""
    return [s.times[0] - s.asked for s in seen.asked if s.times and seen.start <= s.asked and s.times[0] <= seen.end]


def _between(seen):
    pairs = (pair for stream in seen.asked for pair in itertools.pairwise(stream.times))
    return [b - a for a, b in pairs if seen.start <= a and b <= seen.end]


def summary(found: Figures) -> str:
    """A line of progress."""
    return (
        f"first token after {milliseconds(found.first_token_seconds.p50)} ms, "
        f"{found.tokens_per_second_a_stream:.3g} tokens/s a stream, {found.tokens_per_second:.3g} in all"
    )


def milliseconds(seconds: float) -> str:
    """'4.12', '1563'."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
