"""Scores a finished run on a benchmark, or on data of your own.

    python -m hovle_jax.evaluate --checkpoint runs/instruct --benchmark easy_vqa
    python -m hovle_jax.evaluate --checkpoint runs/contrast --benchmark easy_vqa_zero_shot --json
    python -m hovle_jax.evaluate --checkpoint runs/instruct --data rows.jsonl --scorer exact
    python -m hovle_jax.evaluate --checkpoint hovle --benchmark pope --tsv POPE.tsv --rules vlmevalkit
    python -m hovle_jax.evaluate zeroshot --checkpoint runs/contrast,runs/instruct --data FOLDER_OF_CLASSES
    python -m hovle_jax.evaluate shift --checkpoint runs/contrast --data FOLDER_OF_CLASSES --corruptions all
    python -m hovle_jax.evaluate retrieval --checkpoint runs/contrast --data pairs.jsonl

All answers are written to predictions_NAME.jsonl in the checkpoint's folder, or to predictions.jsonl in --out
(docs/evaluation.md). An action as the first argument scores what a CLIP does (docs/clip.md): `zeroshot` classifies
labelled images, `shift` corrupted ones or several sets of them, `retrieval` finds the captions of images and back.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import options
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

if TYPE_CHECKING:
    from hovle_jax.evaluation.asking import Way
    from hovle_jax.evaluation.clip.zero_shot_report import Task
    from hovle_jax.evaluation.public.run import OnTable
    from hovle_jax.evaluation.results import Scored

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "The folder of a finished run or an import: runs/instruct; a public checkpoint or hf:ORG/NAME",
)
BENCHMARK = flags.DEFINE_string(
    "benchmark",
    None,
    "easy_vqa (the default), easy_vqa_captions, or easy_vqa_zero_shot for a contrast run; with --tsv a public one: "
    "textvqa, docvqa, infovqa, chartqa, gqa, ocrbench, pope, mme, hallusionbench, mmbench, mmmu, seed, scienceqa, "
    "ai2d, mmvet or mathvista",
)
TSV = flags.DEFINE_string("tsv", "", "The questions of a public benchmark, as VLMEvalKit has them: POPE.tsv")
RULES = flags.DEFINE_string(
    "rules", "", "Who says how a public benchmark is scored: vlmevalkit, lmms-eval or internvl; default: by benchmark"
)
SPLIT = flags.DEFINE_string("split", "", "The split of --tsv, of a file that has several; default: by benchmark")
DATA = flags.DEFINE_string("data", "", "In place of a benchmark: any source that training reads, as rows.jsonl")
OUTSIDE_ROOT = flags.DEFINE_bool("outside_root", False, "Image paths of --data rows may lead out of their folder")
SCORER = flags.DEFINE_string("scorer", "exact", "How --data is scored: exact, relaxed, anls, choice or vqa")
OUT = flags.DEFINE_string("out", "", "The folder for predictions and scores; default: the checkpoint's")
LIMIT = flags.DEFINE_integer("limit", 0, "Only the first so many items, of --data rows (0: all)", lower_bound=0)
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; default: as in training, with --tsv by benchmark", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "The longest answer to --data (64) or --tsv (by benchmark), in tokens", lower_bound=1
)
SLOTS = flags.DEFINE_integer(
    "slots", 0, "Questions that an engine answers at once, each as long as its own answer takes: 8; 0: in batches, "
    "which wait for the longest answer and are faster where answers are a word or two", lower_bound=0,
)  # fmt: skip
LABEL = flags.DEFINE_string("label", "", "Of an action: the field of --data rows that names the class; default: label")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else")
for holder in (*options.OF_CLASSES, *options.OF_SHIFT, DTYPE):
    flags.declare_key_flag(holder.name)  # so that --help lists them
USAGE = "python -m hovle_jax.evaluate [ACTION] --checkpoint DIR [options]"


def say(line: str) -> None:
    """Progress is no result, so it goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def way() -> "Way":
    """The flags that say how the model is loaded and asked."""
    from hovle_jax.evaluation.asking import Way

    return Way(SLOTS.value, DTYPE.value)


def on_benchmark(folder: str) -> "tuple[dict[str, str], Scored, Path]":
    """-> (what the scores are of, the scores, the predictions file)."""
    from hovle_jax.evaluation.benchmarks import evaluate, find_built_in
    from hovle_jax.evaluation.own_data import predictions_path
    from hovle_jax.evaluation.remembering import remembered
    from hovle_jax.evaluation.results import write_predictions
    from hovle_jax.inference.folders import check_model_folder

    name = BENCHMARK.value or "easy_vqa"
    find_built_in(name)
    check_model_folder(folder)
    path, asked = predictions_path(folder, name, OUT.value), way()
    about = asked.about(folder) | {"benchmark": name, "max_tiles": MAX_TILES.value}
    with remembered(path, about, say) as memory:
        scored = evaluate(folder, name, LIMIT.value, MAX_TILES.value, say, asked, memory)
        write_predictions(path, scored.answered)
    return {"benchmark": name, "checkpoint": folder, "split": "test"}, scored, path


def on_data(folder: str) -> "tuple[dict[str, str], Scored, Path]":
    """The same of --data."""
    from hovle_jax.evaluation.own_data import evaluate_data

    scored, path = evaluate_data(
        folder, DATA.value, SCORER.value, OUT.value, LIMIT.value, MAX_TILES.value, MAX_NEW_TOKENS.value or 64, say,
        way(), OUTSIDE_ROOT.value,
    )  # fmt: skip
    return {"data": DATA.value, "checkpoint": folder, "scorer": SCORER.value}, scored, path


def on_tsv(folder: str) -> "tuple[dict[str, str], OnTable, Path]":
    """The same of --tsv."""
    from hovle_jax.evaluation.public.run import evaluate_tsv

    found = evaluate_tsv(
        folder, BENCHMARK.value or "", TSV.value, RULES.value, SPLIT.value, OUT.value, LIMIT.value, MAX_TILES.value,
        MAX_NEW_TOKENS.value or 0, say, way(),
    )  # fmt: skip
    return found.about | {"checkpoint": folder}, found, found.files["predictions"]


def check_flags() -> None:
    """Raises UserError for flags that do not go together, so that none is dropped."""
    if DATA.value and (BENCHMARK.value or TSV.value):
        raise UserError("--benchmark and --data exclude each other: a benchmark has data of its own")
    if TSV.value and not BENCHMARK.value:
        raise UserError("--tsv needs --benchmark, which says how its questions are asked and scored: --benchmark pope")
    if not DATA.value and flags.FLAGS["scorer"].present:
        raise UserError("--scorer is for --data; a benchmark has its own")
    for flag in (RULES, SPLIT):
        if flag.value and not TSV.value:
            raise UserError(f"--{flag.name} is for --tsv")
    if MAX_NEW_TOKENS.value and not (DATA.value or TSV.value):
        raise UserError("--max_new_tokens is for --data and --tsv; easy-VQA has its own")


def on_questions() -> None:
    """Without an action: a benchmark, or rows of questions."""
    folder = command_line.local_folder("checkpoint")
    check_flags()
    from hovle_jax.conversion import downloads

    started, folder = time.time(), str(downloads.found(folder))
    about, scored, path = on_tsv(folder) if TSV.value else on_data(folder) if DATA.value else on_benchmark(folder)
    result = about | scored.scores | scored.details() | {"predictions": str(path)}
    result["seconds"] = round(time.time() - started, 1)
    if JSON.value:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {printable(value)}")


def checkpoints() -> list[str]:
    """The folders that --checkpoint names, several with commas; public ones are imported."""
    named = command_line.local_folder("checkpoint").split(",")
    from hovle_jax.conversion import downloads

    return [str(downloads.found(name.strip())) for name in named if name.strip()]


def task() -> "Task":
    """The flags that say which labelled images are classified."""
    from hovle_jax.evaluation.clip.zero_shot_report import Task

    return Task(command_line.required("data"), LABEL.value, LIMIT.value, OUT.value, OUTSIDE_ROOT.value)


def zeroshot() -> None:
    """Classifies labelled images by the names of their classes."""
    from hovle_jax.evaluation.clip.classifiers import Asked
    from hovle_jax.evaluation.clip.zero_shot_report import COLUMNS, evaluate_zero_shot, table

    asked, chosen = Asked.of_flags(MAX_TILES.value), task()
    results = evaluate_zero_shot(checkpoints(), chosen, asked, say)
    print(json.dumps({"results": results}) if JSON.value else printable("\n".join(table(results, COLUMNS)), lines=True))


def shift() -> None:
    """The same of corrupted images, or of several sets of images."""
    from hovle_jax.evaluation.clip.classifiers import Asked
    from hovle_jax.evaluation.clip.zero_shot_report import table
    from hovle_jax.evaluation.shift.report import COLUMNS, evaluate_shift

    asked, chosen = Asked.of_flags(MAX_TILES.value), task()
    more = (options.CORRUPTIONS.value, options.BASELINE.value, options.CORRUPTION_SEED.value, say)
    results = evaluate_shift(checkpoints(), chosen, asked, *more)
    print(json.dumps({"results": results}) if JSON.value else printable("\n".join(table(results, COLUMNS)), lines=True))


def retrieval() -> None:
    """Ranks the texts for each image of rows of pairs, and the images for each text."""
    from hovle_jax.evaluation.clip.retrieval import COLUMNS, evaluate_retrieval
    from hovle_jax.evaluation.clip.zero_shot_report import table

    results = evaluate_retrieval(checkpoints(), task(), options.BATCH_SIZE.value, DTYPE.value, say)
    print(json.dumps({"results": results}) if JSON.value else printable("\n".join(table(results, COLUMNS)), lines=True))


QUESTIONS = (BENCHMARK, TSV, RULES, SPLIT, SCORER, MAX_NEW_TOKENS, SLOTS)
CLASSES = (LABEL, *options.OF_CLASSES)
# Action -> (function, the flags that are not for all actions); '' is none.
ACTIONS = {
    "": (on_questions, QUESTIONS),
    "zeroshot": (zeroshot, CLASSES),
    "shift": (shift, (*CLASSES, *options.OF_SHIFT)),
    "retrieval": (retrieval, (options.BATCH_SIZE,)),
}


def check_own_flags(action: str) -> None:
    """Raises UserError for a flag of other actions, so that none is dropped."""
    own = {name: {holder.name for holder in several} for name, (_, several) in ACTIONS.items()}
    for flag in sorted(set().union(*own.values()) - own[action]):
        if flags.FLAGS[flag].present:
            takes = ", ".join(name or "questions" for name, several in own.items() if flag in several)
            raise UserError(f"--{flag} is not for {action or 'questions'}, but for {takes}")


def main(arguments: list[str]) -> None:
    """Calls the action that the first argument names."""
    action, *more = arguments or [""]
    if action not in ACTIONS or more:
        known = ", ".join(filter(None, ACTIONS))
        raise UserError(f"unexpected argument {[action, *more][-1]!r}; an action comes first and alone, one of {known}")
    check_own_flags(action)
    ACTIONS[action][0]()


if __name__ == "__main__":
    command_line.run(main, USAGE)
