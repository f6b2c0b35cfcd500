"""A model goes through a public benchmark: its answers, their score, and the files for others who score."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

from hovle_jax.checkpoints import load_model_config
from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.errors import UserError
from hovle_jax.evaluation import rules
from hovle_jax.evaluation.asking import Way, written
from hovle_jax.evaluation.benchmarks import find_public
from hovle_jax.evaluation.public.answers import AnswerFile, fingerprint
from hovle_jax.evaluation.public.prompts import tiled
from hovle_jax.evaluation.public.questions import Asked, choose
from hovle_jax.evaluation.public.submissions import has_excel, write_json, write_rows
from hovle_jax.evaluation.public.table import ROWS
from hovle_jax.evaluation.public.tsv import read_table
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.system import files
from hovle_jax.system.progress import track

Say = Callable[[str], None]
DECIMALS = 3


@dataclasses.dataclass(frozen=True)
class OnTable:
    """What came of a TSV.

    Attributes:
      asked: the questions.
      score: by the rule set; None where the answers are submitted.
      settings: what the answers depend on.
      files: {what: the file}.
    """

    asked: Asked
    score: rules.Score | None
    settings: Mapping[str, object]
    files: Mapping[str, pathlib.Path]

    @property
    def about(self) -> dict:
        """What a score is of."""
        found = {"benchmark": self.asked.benchmark.title, "split": self.asked.split}
        return found | ({"rules": self.score.rule_set} if self.score else {})

    @property
    def scores(self) -> dict:
        """{the metric: the number, "of": that where all is right}, and how many rows were asked."""
        rows = {"questions": len(self.asked.rows)}
        score = self.score
        return ({score.metric: round(score.value, DECIMALS), "of": score.full} if score else {}) | rows

    def details(self) -> dict:
        """What a command prints beside the scores."""
        found = {}
        if self.score:
            found["95% interval"] = [round(end, DECIMALS) for end in self.score.interval]
            found["report"] = {name: part for name, part in self.score.report.items() if name != "group_hit"}
        else:
            found["scored by"] = self.asked.benchmark.server
        if self.asked.without_image:
            found["rows without an image"] = self.asked.without_image
        return found | {what: str(path) for what, path in self.files.items()}


def evaluate_tsv(
    folder: str | pathlib.Path,
    name: str,
    tsv: str | pathlib.Path,
    rule_set: str = "",
    split: str = "",
    out: str | pathlib.Path = "",
    limit: int = 0,
    max_tiles: int | None = None,
    max_new_tokens: int = 0,
    say: Say = print,
    way: Way = Way(),
) -> OnTable:
    """Scores a model on a TSV of VLMEvalKit. Answers that an interrupted evaluation left are not asked again.

    Args:
      name: of the benchmark.
      rule_set, split, limit: see `questions.choose`.
      out: the folder of all files; empty = the model's.
      max_tiles: of an image; None = the benchmark's, for a model that learned on several tiles.
      max_new_tokens: the longest answer; 0 = the benchmark's.
      say: takes a line of progress now and then.
      way: how the model is loaded and asked.
    Raises:
      UserError: no such benchmark, file or model, or a row that cannot be asked or scored.
    """
    tsv, folder = pathlib.Path(tsv), pathlib.Path(folder)
    asked = choose(find_public(name), read_table(tsv), rule_set, split, limit)
    check_model_folder(folder)
    settings = _settings(folder, asked, max_tiles, max_new_tokens, way)
    target = pathlib.Path(out or folder)
    with AnswerFile(target / f"predictions_{tsv.stem}.jsonl", settings) as answers:
        _ask(folder, asked, settings, answers, say, way)
    said = answers.answers
    score = _score(asked, said)
    found = OnTable(asked, score, settings, _write(target, folder, asked, said, say))
    return dataclasses.replace(found, files={**found.files, **_write_score(target, found)})


def _settings(folder, asked, max_tiles, max_new_tokens, way):
    benchmark = asked.benchmark
    own = benchmark.max_tiles if load_model_config(folder).max_tiles > 1 else 1
    return {
        "checkpoint": str(folder.resolve()),
        "model written": written(folder),
        "tsv": asked.table.path.name,
        "cells": fingerprint(asked.table),
        "benchmark": benchmark.title,
        "max_tiles": max_tiles or own,
        "max_new_tokens": max_new_tokens or benchmark.max_new_tokens,
    } | ({"dtype": way.dtype} if way.dtype else {})


def _ask(folder, asked, settings, answers, say, way):
    """Adds the answers that are missing. A model is loaded only where there are any."""
    rows, name = answers.missing(asked.rows), asked.benchmark.title
    if len(rows) < len(asked.rows):
        say(f"{answers.path} has {len(asked.rows) - len(rows):,} of {len(asked.rows):,} answers: going on from there")
    if not rows:
        return
    words, tokens = asked.benchmark.words, settings["max_new_tokens"]
    benchmark = dataclasses.replace(
        asked.benchmark, prompt=tiled(words, settings["max_tiles"], asked.benchmark.enlarged), max_new_tokens=tokens
    )
    loaded = way.load(folder, benchmark.components)
    given = way.of(benchmark).asked(loaded, asked.items(rows))
    for row, one in zip(rows, track(given, say, name, benchmark.unit, len(rows)), strict=True):
        if isinstance(one, BadEvent):
            raise row.error("question", f"it cannot be asked: {one.detail or one.reason}")
        answers.add(row.index, one[1])


def _score(asked, said):
    if not asked.rule_set:
        return None
    cases = asked.cases(lambda row: said[row.index])
    return rules.scored(asked.benchmark.title, asked.split, asked.rule_set, cases)


def _write(target, folder, asked, said, say):
    """The predictions for VLMEvalKit and, where somebody else scores them, what is submitted."""
    stem, benchmark = asked.table.path.stem, asked.benchmark
    path = target / f"{folder.resolve().name}_{stem}"  # as VLMEvalKit names it: MODEL_BENCHMARK
    try:
        files = {"predictions": write_rows(path, asked.table, asked.rows, said)}
        if asked.rule_set:
            return files
        submitted = target / f"submission_{stem}"
        if benchmark.submission != ROWS:
            return files | {"submission": write_json(submitted, benchmark.submission, asked.rows, said)}
        if not has_excel():
            say(f"{benchmark.server} takes .xlsx: pip install openpyxl and run the same command again")
        return files | {"submission": write_rows(submitted, asked.table, asked.rows, said)}
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write in {target}: {why}; name another folder with --out") from None


def _write_score(target, found):
    """Adds the score to results_NAME.json, in the place of an older one of the same kind -> {"results": the file}."""
    if not found.score:
        return {}
    path = target / f"results_{found.asked.table.path.stem}.json"
    kept = files.read_json(path, ["scores"])["scores"] if path.is_file() else []
    score, key = found.score, found.about | {"questions": len(found.asked.rows)}
    same = lambda one: all(one.get(name) == value for name, value in key.items())
    entry = key | {
        "metric": score.metric,
        "value": score.value,
        "of": score.full,
        "95% interval": list(score.interval),
        "settings": dict(found.settings),
        "report": score.report,
    }
    files.write_json(path, {"scores": [*(one for one in kept if not same(one)), entry]})
    return {"results": path}
