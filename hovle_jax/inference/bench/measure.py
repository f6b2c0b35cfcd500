"""Measures case after case."""

from collections.abc import Callable, Iterator, Sequence

import jax

from hovle_jax.inference.bench import traffic
from hovle_jax.inference.bench.cases import Case
from hovle_jax.inference.bench.clients import watch
from hovle_jax.inference.bench.figures import Figures, decoding_steps, figures, summary
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
    seen = watch(subject, case, engine, answers, say)
    longest = [tokens for _, tokens in decoding_steps(seen)] or [case.new_tokens]
    reading = seen.asked[0].reading
    caches = traffic.cache_bytes(engine, reading.length, reading.long_length, longest)
    del engine
    return figures(
        case, seen, prompt_tokens(subject.hovle, case), traffic.weight_bytes(subject.params), caches,
        read_bandwidth(gigabytes),
    )  # fmt: skip
