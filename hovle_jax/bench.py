"""Measures how fast a model answers: the paper's table 6, and one to many streams at once.

    python -m hovle_jax.bench --checkpoint runs/instruct
    python -m hovle_jax.bench --checkpoint smol-llm --streams 1,8,32 --dtype int8
    python -m hovle_jax.bench --config configs/instruct.py:hovle --streams 1    # random weights, which are as fast

Each request is one tile and 256 tokens of text, its answer 120 tokens. Every stream asks again as soon as it is
answered; a first turn, which compiles, is not measured. Writes bench.json and bench.png to --out (docs/answering.md).
"""

import dataclasses
import functools
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line

if TYPE_CHECKING:
    from hovle_jax.inference.bench.cases import Case
    from hovle_jax.inference.bench.subject import Subject
    from hovle_jax.model.config import HoVLEConfig

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "The folder of a finished run or an import, as runs/instruct; smol-llm, which is fetched; or a public checkpoint: "
    "a folder in Hugging Face layout, a .gguf file or hf:ORG/NAME, imported on the way",
)  # fmt: skip
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "In place of --checkpoint: random weights of this config's sizes, as configs/instruct.py:hovle"
)
flags.declare_key_flag(DTYPE.name)  # so that --help lists it
STREAMS = flags.DEFINE_string("streams", "", "Answers at once, as 1,8,32; default: 1,2,4,8,16,32")
TILE_SIZES = flags.DEFINE_string(
    "tile_sizes", "", "Pixels along a side of a tile, one after another; default: 336,448, or the model's own"
)
TEXT_TOKENS = flags.DEFINE_integer("text_tokens", None, "Of each request; default: 256", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", None, "Of each answer; default: 120", lower_bound=2)
ANSWERS = flags.DEFINE_integer(
    "answers", None, "Answers measured by case; no fewer than there are streams. Default: 8", lower_bound=1
)
QUICK = flags.DEFINE_bool("quick", False, "A short try: 1 and 2 streams, 2 answers of 8 tokens to 16 of text")
OUT = flags.DEFINE_string("out", "bench", "The folder for bench.json and bench.png")
QUICK_GIGABYTES = 0.1  # read to measure the bandwidth


def main() -> None:
    """All that can be wrong is said before weights are read and anything is compiled."""
    config, folder = _model()
    cases, answers = _cases(config)
    out = _out_folder()
    from hovle_jax.inference.bench import measure, showing

    say = functools.partial(print, file=sys.stderr, flush=True)
    subject, found = _subject(folder), []
    name = pathlib.Path(folder).absolute().name if folder else f"random {CONFIG.value.preset}"
    gigabytes = QUICK_GIGABYTES if QUICK.value else None
    try:
        for figures in measure.measure_all(subject, cases, answers, say, gigabytes):
            found.append(figures)
            showing.write(out, showing.result(subject, name, found))
    except KeyboardInterrupt:
        if not found:
            raise UserError("interrupted before anything was measured") from None
        say("interrupted; what was measured until now:")
    if not found:
        raise UserError("not even the first case finds room: try --dtype int8")
    made = showing.result(subject, name, found)
    print(showing.table(made, found))
    print(f"figures: {out / showing.JSON_FILE}, plot: {showing.draw(out, made, found)}")


def _model() -> "tuple[HoVLEConfig, pathlib.Path | None]":
    """The sizes of what is measured, and its folder if it has one."""
    if (CHECKPOINT.value is None) == (not flags.FLAGS["config"].present):
        raise UserError("give --checkpoint, as runs/instruct, or --config, as configs/instruct.py:hovle, and not both")
    if CHECKPOINT.value is None:
        command_line.config_file()
        return RunConfig.from_dict(CONFIG.value.to_dict()).model_config.model, None
    name = command_line.local_folder("checkpoint")
    from hovle_jax.checkpoints import load_model_config
    from hovle_jax.conversion.downloads import model_folder

    folder = model_folder(name)
    config = load_model_config(folder)
    if config.llm is None:
        raise UserError(f"{folder} holds no llm: give the folder of a finished run that answers, as runs/instruct")
    return config.model, folder


def _cases(config: "HoVLEConfig") -> "tuple[tuple[Case, ...], int]":
    """What is measured, and for how many answers."""
    from hovle_jax.inference.bench.cases import QUICK as SHORT
    from hovle_jax.inference.bench.cases import Protocol, numbers, plan

    given: dict[str, Any] = {
        flag.name: flag.value for flag in (TEXT_TOKENS, NEW_TOKENS, ANSWERS) if flag.value is not None
    }
    if STREAMS.value:
        given["streams"] = numbers("streams", STREAMS.value)
    protocol = dataclasses.replace(SHORT if QUICK.value else Protocol(), **given)
    return plan(config, protocol, numbers("tile_sizes", TILE_SIZES.value)), protocol.answers


def _out_folder() -> pathlib.Path:
    folder = pathlib.Path(command_line.local_folder("out"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder}: no folder can be made there ({error.strerror}); choose another") from None
    return folder


def _subject(folder: pathlib.Path | None) -> "Subject":
    from hovle_jax.inference.bench import subject

    if folder is not None:
        return subject.load(folder, DTYPE.value)
    return subject.random(RunConfig.from_dict(CONFIG.value.to_dict()).model_config, DTYPE.value)


if __name__ == "__main__":
    command_line.run(main)
