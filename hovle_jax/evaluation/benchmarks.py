"""THE table of benchmarks. Another one is a file beside this one and a row here."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable

from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.errors import UserError
from hovle_jax.evaluation import easy_vqa
from hovle_jax.evaluation.asking import Way
from hovle_jax.evaluation.benchmark import Benchmark
from hovle_jax.evaluation.public.table import PUBLIC, Public
from hovle_jax.evaluation.remembering import Memory
from hovle_jax.evaluation.results import Scored
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.system.progress import track

BENCHMARKS: dict[str, Benchmark] = {
    "easy_vqa": easy_vqa.QUESTIONS,
    "easy_vqa_captions": easy_vqa.CAPTIONS,
    "easy_vqa_zero_shot": easy_vqa.ZERO_SHOT,
    **PUBLIC,
}


def find(name: str) -> Benchmark:
    """A row by its name. Raises UserError where there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}; use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def find_public(name: str) -> Public:
    """A row that reads a TSV. Raises UserError where there is none of this name."""
    row = find(name)
    if not isinstance(row, Public):
        raise UserError(f"{name} reads no TSV: leave --tsv out, or use one of {', '.join(PUBLIC)}")
    return row


def find_built_in(name: str) -> Benchmark:
    """A row that has its own questions. Raises UserError where there is none of this name."""
    row = find(name)
    if isinstance(row, Public):
        raise UserError(f"{name} has its questions in a TSV of VLMEvalKit: name it with --tsv FILE.tsv")
    return row


def evaluate(
    folder: str | pathlib.Path,
    name: str,
    limit: int = 0,
    max_tiles: int | None = None,
    say: Callable[[str], None] | None = None,
    way: Way = Way(),
    memory: Memory | None = None,
) -> Scored:
    """Scores a finished run, on the first `limit` items of the benchmark (0: all).

    Args:
      max_tiles: of the grid of an image; None = as the model was trained.
      say: takes a line of progress now and then.
      way: how it is loaded and asked.
      memory: what answers are taken from and written to as they come.
    Raises:
      UserError: an unknown benchmark, a run without the needed components, or an item that cannot be asked.
    """
    benchmark = way.of(find_built_in(name))
    check_model_folder(folder)
    loaded = way.load(folder, benchmark.components).with_max_tiles(max_tiles)
    items = list(itertools.islice(benchmark.items(), limit or None))
    before = 0
    if memory:
        benchmark, before = dataclasses.replace(benchmark, ask=memory.of(benchmark.ask)), len(memory.known)
    answered = benchmark.answered(loaded, items)
    if say:
        answered = track(answered, say, name, benchmark.unit, len(items), before=before)
    return Scored(benchmark, tuple(map(_of_a_sound_item, answered)))


def _of_a_sound_item(answered):
    if isinstance(answered, BadEvent):
        raise UserError(f"a question of the benchmark cannot be asked: {answered.detail or answered.reason}")
    return answered
