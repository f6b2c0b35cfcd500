"""Scores on any source that training can read: every question of its rows is asked."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from hovle_jax.corpora.loading import source_path
from hovle_jax.data.bad_samples import BadEvent, BadSample, count_reasons
from hovle_jax.data.files.mixture import Entry, open_mixture
from hovle_jax.data.files.records import Record
from hovle_jax.data.images import as_image, decode_image
from hovle_jax.data.text.chat_template import IMAGE_MARK
from hovle_jax.data.text.conversation import CAPTION_REQUEST
from hovle_jax.errors import UserError
from hovle_jax.evaluation import scorers
from hovle_jax.evaluation.asking import Way
from hovle_jax.evaluation.benchmark import Answered, Benchmark, Item
from hovle_jax.evaluation.remembering import remembered
from hovle_jax.evaluation.results import Scored, line, lines_into
from hovle_jax.evaluation.scorers import Scorer, exact
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.inference.load import Loaded
from hovle_jax.system.progress import track

SPLIT = "test"  # of folders that have several, unless one is named
MAX_NEW_TOKENS = 64
SHOWN_SIDE = 320  # pixels of an image that is kept for a report

Say = Callable[[str], None]


def items_of(record: Record, scorer: Scorer, where: tuple[str, str] = ("", "")) -> list[Item]:
    """The questions of a record, each after the turns before it with their reference answers.

    A record with a caption alone is asked for it, as it was trained.

    Raises:
      BadSample: nothing to be asked, a broken image, or references that the scorer cannot score.
    """
    turns, references = record.turns, record.references
    if not turns:
        if not (record.images and record.caption):
            raise BadSample("no_question", "neither a question with its answer nor an image with a caption")
        turns, references = ((CAPTION_REQUEST, record.caption),), ((record.caption,),)
    count = len(record.images) if record.turns else 1  # a caption is about the first image alone
    images = tuple(decode_image(record.image_bytes(i)) for i in range(count))
    turns = tuple((question.strip(), answer.strip()) for question, answer in turns)  # as in training
    marked = any(IMAGE_MARK in question for question, _ in turns)
    found = []
    for i, (question, _) in enumerate(turns):
        scorer("", references[i], record.options)  # raises
        said = (*turns[:i], (question, None))
        seen = sum(text.count(IMAGE_MARK) for text, _ in said) if marked else count
        found.append(Item(images[:seen], said, references[i], record.options, "", record.system, where))
    return found


def read_items(entry: Entry, indices: Iterable[int], scorer: Scorer) -> Iterator[Item | BadEvent]:
    """The questions of a source's rows, one row in memory at a time; a row that cannot be asked is a BadEvent."""
    source = entry.source
    for index in indices:
        try:
            yield from items_of(source.record(index), scorer, source.where(index))
        except BadSample as error:
            file, row = source.where(index)
            yield BadEvent(-1, source.name, file, row, error.reason, error.detail)


def small(answered: Answered, keep_images: bool) -> Answered:
    """The answer with its first image, reduced, or with none: many are kept in memory."""
    images = answered.item.images[:1] if keep_images else ()
    shown = tuple(as_image(image).copy() for image in images)
    for image in shown:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    item = dataclasses.replace(answered.item, images=tuple(np.asarray(image, np.uint8) for image in shown))
    return dataclasses.replace(answered, item=item)


def own_benchmark(scorer: Scorer, **more) -> Benchmark:
    """What own rows are asked and scored by; its items come one source at a time."""
    return Benchmark(**({"items": tuple, "scorer": scorer, "max_new_tokens": MAX_NEW_TOKENS} | more))


def ask_rows(
    loaded: Loaded,
    entries: list[Entry],
    benchmark: Benchmark,
    limit: int = 0,
    max_tiles: int | None = None,
    say: Say | None = None,
) -> Iterator[Answered | BadEvent]:
    """Asks a model about the rows of sources, each row once.

    Args:
      limit: only the first so many rows; 0 = all.
      max_tiles: of an image; None = as its source says, or else as in training.
      say: takes a line of progress now and then.
    """
    total = sum(entry.used for entry in entries)
    total = min(total, limit or total)
    count = iter(track(range(total), say, "evaluation", "rows", total) if say else range(total))
    for entry in entries:
        indices = (i for i, _ in zip(range(entry.used), count))
        asked = loaded.with_max_tiles(max_tiles or entry.max_tiles)
        yield from benchmark.answered(asked, read_items(entry, indices, benchmark.scorer))


def evaluate_data(
    folder: str | pathlib.Path,
    data: str,
    scorer: str,
    out: str = "",
    limit: int = 0,
    max_tiles: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    say: Say = print,
    way: Way = Way(),
    outside_root: bool = False,
) -> tuple[Scored, pathlib.Path]:
    """Scores a model on the rows of a source -> (what came of it, the predictions file).

    Args:
      data: as data.source names it.
      scorer: a key of SCORERS.
      out: the folder of predictions.jsonl; empty = the model's, with the data's name in that of the file.
      limit, max_tiles, say: see `ask_rows`.
      way: how the model is loaded and asked.
      outside_root: image paths of rows may lead out of their folder.
    Raises:
      UserError: an unknown scorer, no such source or model, or no row that can be asked.
    """
    benchmark = way.of(own_benchmark(scorers.find(scorer), metric="score", max_new_tokens=max_new_tokens))
    entries = open_mixture(source_path(data, SPLIT, say), SPLIT, outside_root)
    check_model_folder(folder)
    path = predictions_path(folder, data, out)
    about = {"data": data, "max_tiles": max_tiles, "max_new_tokens": max_new_tokens}
    loaded = way.load(folder)
    answered, bad = [], []
    with remembered(path, way.about(folder) | about, say) as memory, lines_into(path) as write:
        benchmark = dataclasses.replace(benchmark, ask=memory.of(benchmark.ask))
        for one in ask_rows(loaded, entries, benchmark, limit, max_tiles, say):
            if isinstance(one, BadEvent):
                bad.append(one)
                continue
            write(line(len(answered), one))
            answered.append(small(one, keep_images=False))
        if not answered:
            raise UserError(_nothing_asked(data, bad))
    if bad:
        listed = path.with_name(path.name.replace("predictions", "bad_rows", 1))
        with lines_into(listed) as write:
            for event in bad:
                write(dataclasses.asdict(event))
        say(f"{len(bad):,} rows or questions could not be asked; they are listed in {listed}")
    return Scored(benchmark, tuple(answered), tuple(bad)), path


def predictions_path(folder: str | pathlib.Path, name: str, out: str = "") -> pathlib.Path:
    """OUT/predictions.jsonl, or RUN/predictions_NAME.jsonl."""
    if out:
        return pathlib.Path(out) / "predictions.jsonl"
    stem = pathlib.PurePath(name).name
    for suffix in pathlib.PurePath(stem).suffixes[-1:]:
        stem = stem.removesuffix(suffix)
    return pathlib.Path(folder) / f"predictions_{re.sub(r'[^0-9A-Za-z-]+', '_', stem).strip('_')}.jsonl"


def _nothing_asked(data, bad):
    reasons = ", ".join(f"{reason} {count}" for reason, count in count_reasons(bad).items())
    first = f"{bad[0].sample}: {bad[0].detail or bad[0].reason}"
    return f"{data}: no row can be asked ({reasons}); the first is {first}; docs/evaluation.md says what rows may be"


def held_out(loaded: Loaded, data: str, limit: int, say: Say = print, outside_root: bool = False) -> Scored:
    """Exact match on the first `limit` rows of a source, with small images; rows without a question are left out."""
    benchmark = own_benchmark(exact, metric="accuracy on held-out rows")
    entries = open_mixture(source_path(data, SPLIT, say), SPLIT, outside_root)
    answered, bad = [], []
    for one in ask_rows(loaded, entries, benchmark, limit):
        if isinstance(one, Answered):
            answered.append(small(one, keep_images=True))
        else:
            bad.append(one)
    return Scored(benchmark, tuple(answered), tuple(bad))
