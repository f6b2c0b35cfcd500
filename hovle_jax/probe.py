"""Fits linear probes to a CLIP's image features: on all images, and on a few of each class.

    python -m hovle_jax.probe --checkpoint runs/contrast --data flowers/train --test flowers/test
    python -m hovle_jax.probe --checkpoint hf:openai/clip-vit-base-patch32 --data a.jsonl --test b.jsonl --label group
    python -m hovle_jax.probe --checkpoint runs/contrast --data flowers/train --test flowers/test --shots 1,4

--data and --test are folders with a folder of images for each class, or rows whose --label names the class. Features
are those before the projection; they are encoded once and kept in the cache. Writes probe.json and probe.png to --out
(docs/clip.md).
"""

import json
import pathlib
import sys

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import options
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The folder of a finished run or an import: runs/contrast; a public checkpoint or hf:ORG/NAME"
)
DATA = flags.DEFINE_string("data", None, "The images to fit: a folder of classes, or rows that training reads")
TEST = flags.DEFINE_string("test", None, "The images to score")
LABEL = flags.DEFINE_string("label", "", "The field of rows that names the class; default: label")
KIND = flags.DEFINE_string("kind", "logistic", "logistic, or ridge, which is closed-form and faster")
SHOTS = flags.DEFINE_string("shots", "1,2,4,8,16", "Images of each class; empty: all images alone")
SEEDS = flags.DEFINE_integer("seeds", 5, "Draws of each number of shots")
OUT = flags.DEFINE_string("out", "", "The folder for probe.json and probe.png; default: probe in the checkpoint's")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else")
for holder in (options.TEMPLATES, options.BATCH_SIZE, DTYPE):
    flags.declare_key_flag(holder.name)  # so that --help lists them


def say(line: str) -> None:
    """Progress is no result, so it goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def shots() -> tuple[int, ...]:
    """--shots as numbers."""
    try:
        return tuple(int(part) for part in SHOTS.value.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--shots={SHOTS.value}: give numbers with commas, as 1,2,4,8,16") from None


def main() -> None:
    """All that can be wrong with the options is said before anything is loaded."""
    folder, data, test = (command_line.local_folder("checkpoint"), *map(command_line.required, ("data", "test")))
    from hovle_jax.conversion import downloads
    from hovle_jax.evaluation.probes.report import Asked, lines, probe
    from hovle_jax.inference.encoder import Encoder

    asked = Asked(data, test, LABEL.value, KIND.value, shots(), SEEDS.value, options.TEMPLATES.value)
    asked.check()
    folder = str(downloads.found(folder))
    encoder = Encoder.load(folder, options.BATCH_SIZE.value, DTYPE.value)
    out = pathlib.Path(OUT.value or pathlib.Path(folder) / "probe")
    result = probe(encoder, folder, asked, out, say)
    if JSON.value:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(printable("\n".join(lines(result)), lines=True))
    print(f"{'folder':20} {printable(str(out))}")


if __name__ == "__main__":
    command_line.run(main)
