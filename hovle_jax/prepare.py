"""Data before training: corpora by name, users' own as one corpus, and a look at what a stage will read.

    python -m hovle_jax.prepare emoji
    python -m hovle_jax.prepare tuxpaint
    python -m hovle_jax.prepare jsonl rows.jsonl CORPUS [--held_out 0.01]
    python -m hovle_jax.prepare webdataset 'shards/{00000..00127}.tar' CORPUS
    python -m hovle_jax.prepare preview --config configs/instruct.py --config.data.source=CORPUS
    python -m hovle_jax.prepare bench --config configs/instruct.py --config.data.source=CORPUS

emoji, tuxpaint: fetched by package, version and sha256, drawn and written into the cache; data.source=emoji reads it.

jsonl, webdataset: any source that data.source may name (jsonl, meta .json, a JSON list, tar, Parquet, text) becomes a
folder of ArrayRecord files with the images inside, each of which was decoded once. Bad samples are left out and
listed in CORPUS/bad_samples.jsonl.

preview: the first batch as an image, and how full rows are, tiles of samples, tokens of sources, in OUT.

bench: images, tiles and tokens a second of the pipeline alone, and the share of time that training waits for it.
"""

import json

from absl import flags
from ml_collections import config_flags

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.system import command_line

USAGE = "emoji | tuxpaint | jsonl SRC DST | webdataset SRC DST | preview --config FILE | bench --config FILE"
CONFIG = config_flags.DEFINE_config_file("config", None, "preview, bench: a stage's config file, with a preset")
ROOT = flags.DEFINE_string("root", "", "jsonl, webdataset: the folder that image paths are relative to")
OUTSIDE_ROOT = flags.DEFINE_bool("outside_root", False, "jsonl, webdataset: image paths may lead out of that folder")
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", 2**26, "jsonl, webdataset: an image of more is a bad sample", lower_bound=1
)
HELD_OUT = flags.DEFINE_float("held_out", 0.0, "jsonl, webdataset: the share of samples that goes to the split 'test'")
CEILING = flags.DEFINE_float("bad_ceiling", 0.01, "jsonl, webdataset: the share of samples that may be unusable")
OUT = flags.DEFINE_string("out", "preview", "preview: the folder of what is written")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "preview, bench: a run's folder or a tokenizer file (default: as train)"
)
STEPS = flags.DEFINE_integer("steps", 20, "bench: how many steps", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object")


def corpus(name: str) -> None:
    from hovle_jax.corpora import prepare

    folder = prepare(name, say=print)
    splits = json.loads((folder / "dataset.json").read_text("utf-8"))["splits"]
    print(f"{folder}: " + ", ".join(f"{split} {values['rows']:,}" for split, values in splits.items()))
    print(f"read it with --config.data.source={name}, and --config.data.held_out={name}:{list(splits)[-1]}")


def convert(source: str, folder: str) -> None:
    from hovle_jax.corpora.converting import convert

    splits = convert(
        source, folder, ROOT.value, HELD_OUT.value, CEILING.value, print, OUTSIDE_ROOT.value, MAX_PIXELS.value
    )
    print(f"{folder}: " + ", ".join(f"{split} {rows:,}" for split, rows in splits.items()))


def run_config() -> RunConfig:
    """--config as RunConfig, checked as `train` does. Raises UserError when it is missing."""
    from hovle_jax.training.checks import check

    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; for example --config configs/instruct.py")
    config = RunConfig.from_dict(CONFIG.value.to_dict())
    check(config)
    return config


def preview() -> None:
    from hovle_jax.training.preview import preview

    show(preview(run_config(), OUT.value, TOKENIZER.value))
    if not JSON.value:
        print(f"images and page in {OUT.value}/report.html")


def bench() -> None:
    from hovle_jax.training.preview import bench

    show(bench(run_config(), STEPS.value, TOKENIZER.value))


def show(facts: dict) -> None:
    if JSON.value:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name}: {value}")


ACTIONS = {
    "emoji": (lambda: corpus("emoji"), 0),
    "tuxpaint": (lambda: corpus("tuxpaint"), 0),
    "jsonl": (convert, 2),
    "webdataset": (convert, 2),
    "preview": (preview, 0),
    "bench": (bench, 0),
}


def main(arguments: list[str]) -> None:
    command_line.dispatch(ACTIONS, arguments, f"python -m hovle_jax.prepare {USAGE}")


if __name__ == "__main__":
    command_line.run(main, USAGE, config=RunConfig)
