"""Measures case after case."""

from collections.abc import Callable, Iterator, Sequence

import jax

from hovle_jax.inference.bench import traffic
from hovle_jax.inference.bench.cases import Case
from hovle_jax.inference.bench.clients import watch, watch_decoding
from hovle_jax.inference.bench.figures import LEAST_STEPS, Decoding, Figures, decoding_steps, figures, summary
from hovle_jax.inference.bench.subject import Subject, prompt_tokens
from hovle_jax.system.read_bandwidth import read_bandwidth


def measure_all(
    subject: Subject, cases: Sequence[Case], answers: int, say: Callable[[str], None], gigabytes: float | None = None
) -> Iterator[Figures]:
    """The figures of each case as soon as they are there. It ends at one that finds no memory, which is said.

    Args:
      answers, gigabytes: as of `measure`.
    """
    for number, case in enumerate(cases, 1):
        try:
            found = measure(subject, case, answers, lambda line, n=number: say(f"[{n}/{len(cases)}] {line}"), gigabytes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"{case.name}: not enough memory on the device; what follows is left out (--streams asks for fewer)")
            return
        say(f"{case.name}: {summary(found)}")
        yield found


def measure(
    subject: Subject, case: Case, answers: int, say: Callable[[str], None], gigabytes: float | None = None
) -> Figures:
    """One case, in an engine of its own.

    Args:
      answers: that are measured, at least.
      gigabytes: read to measure the bandwidth; None = see `read_bandwidth`.
    """
    engine = subject.engine(case)
    seen = watch(case, engine, answers, say)
    decoding = _decoding(engine, seen.asked[0], [step for step in seen.steps if seen.start <= step.end <= seen.end])
    if len(decoding.seconds) < LEAST_STEPS:
        alone = watch_decoding(case, engine)
        decoding = _decoding(engine, alone.asked[0], alone.steps)
    del engine
    weights = traffic.weight_bytes(subject.params)
    return figures(case, seen, prompt_tokens(subject.hovle, case), decoding, weights, read_bandwidth(gigabytes))


def _decoding(engine, stream, steps):
    """`stream`: any of those that made these steps."""
    found, reading = decoding_steps(steps), stream.reading
    longest = [tokens for _, tokens in found] or [len(stream.tokens)]
    caches = traffic.cache_bytes(engine, reading.length, reading.long_length, longest)
    return Decoding([seconds for seconds, _ in found], reading.length, caches)
