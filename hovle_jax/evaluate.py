"""Scores a finished run on a benchmark, or on data of your own.

    python -m hovle_jax.evaluate --checkpoint runs/instruct --benchmark easy_vqa
    python -m hovle_jax.evaluate --checkpoint runs/contrast --benchmark easy_vqa_zero_shot --json
    python -m hovle_jax.evaluate --checkpoint runs/instruct --data rows.jsonl --scorer exact

All answers are written to predictions_NAME.jsonl in the checkpoint's folder, or to predictions.jsonl in --out
(docs/evaluation.md).
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.system import command_line

if TYPE_CHECKING:
    from hovle_jax.evaluation.results import Scored

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The folder of a finished run or an import: runs/instruct")
BENCHMARK = flags.DEFINE_string(
    "benchmark", None, "easy_vqa (the default), easy_vqa_captions, or easy_vqa_zero_shot for a contrast run"
)
DATA = flags.DEFINE_string("data", "", "In place of a benchmark: any source that training reads, as rows.jsonl")
SCORER = flags.DEFINE_string("scorer", "exact", "How --data is scored: exact, relaxed, anls, choice or vqa")
OUT = flags.DEFINE_string("out", "", "The folder for predictions.jsonl; default: the checkpoint's")
LIMIT = flags.DEFINE_integer("limit", 0, "Only the first so many items, of --data rows (0: all)", lower_bound=0)
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; default: as in training", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "The longest answer to --data, in tokens", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else")


def say(line: str) -> None:
    """Progress is no result, so it goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def on_benchmark(folder: str) -> "tuple[dict[str, str], Scored, Path]":
    """-> (what the scores are of, the scores, the predictions file)."""
    from hovle_jax.evaluation.benchmarks import evaluate
    from hovle_jax.evaluation.own_data import predictions_path
    from hovle_jax.evaluation.results import write_predictions

    if flags.FLAGS["scorer"].present:
        raise UserError("--scorer is for --data; a benchmark has its own")
    name = BENCHMARK.value or "easy_vqa"
    scored = evaluate(folder, name, LIMIT.value, MAX_TILES.value, say)
    path = predictions_path(folder, name, OUT.value)
    write_predictions(path, scored.answered)
    return {"benchmark": name, "checkpoint": folder, "split": "test"}, scored, path


def on_data(folder: str) -> "tuple[dict[str, str], Scored, Path]":
    """The same of --data."""
    from hovle_jax.evaluation.own_data import evaluate_data

    scored, path = evaluate_data(
        folder, DATA.value, SCORER.value, OUT.value, LIMIT.value, MAX_TILES.value, MAX_NEW_TOKENS.value, say
    )
    return {"data": DATA.value, "checkpoint": folder, "scorer": SCORER.value}, scored, path


def main() -> None:
    folder = command_line.local_folder("checkpoint")
    if DATA.value and BENCHMARK.value:
        raise UserError("--benchmark and --data exclude each other: a benchmark has data of its own")
    from hovle_jax.conversion.downloads import resolve

    started, folder = time.time(), str(resolve(folder))
    about, scored, path = on_data(folder) if DATA.value else on_benchmark(folder)
    result = about | scored.scores | scored.details() | {"predictions": str(path)}
    result["seconds"] = round(time.time() - started, 1)
    if JSON.value:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    command_line.run(main)
