"""Benchmarks by name: what they need of a run, and how they are scored."""

import dataclasses
from collections.abc import Callable

from hovle_jax.errors import UserError
from hovle_jax.evaluation import easy_vqa
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.inference.load import load_run


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """`score(loaded, limit)` returns (scores, records [(picture, question, answer, expected)])."""

    components: tuple[str, ...]
    score: Callable


BENCHMARKS = {
    "easy_vqa": Benchmark(("embedding", "llm"), easy_vqa.question_answering),
    "easy_vqa_zero_shot": Benchmark(("clip",), easy_vqa.zero_shot),
}


def evaluate(folder, name: str, limit: int = 0, max_tiles: int | None = None) -> tuple:
    """Scores a finished run, on the first `limit` items of the benchmark (0: all).

    Args:
      max_tiles: of the grid of an image; None = as the model was trained.
    Raises:
      UserError: an unknown benchmark, or a run without the needed components.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; use one of {', '.join(BENCHMARKS)}")
    check_model_folder(folder)
    benchmark = BENCHMARKS[name]
    return benchmark.score(load_run(folder, benchmark.components).with_max_tiles(max_tiles), limit)
