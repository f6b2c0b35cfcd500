"""Scores a finished run on a benchmark.

python -m hovle_jax.evaluate --checkpoint runs/instruct --benchmark easy_vqa
python -m hovle_jax.evaluate --checkpoint runs/contrast --benchmark easy_vqa_zero_shot --json
"""

import json
import time

from absl import flags

from hovle_jax.system import command_line

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The folder of a finished run: runs/instruct")
BENCHMARK = flags.DEFINE_string("benchmark", "easy_vqa", "easy_vqa, or easy_vqa_zero_shot for a contrast run")
LIMIT = flags.DEFINE_integer("limit", 0, "Only the first so many items (0: all)", lower_bound=0)
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; default: as in training", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else")


def main() -> None:
    folder = command_line.local_folder("checkpoint")
    from hovle_jax.evaluation.benchmarks import evaluate

    started = time.time()
    scores, _ = evaluate(folder, BENCHMARK.value, LIMIT.value, MAX_TILES.value)
    result = {"benchmark": BENCHMARK.value, "checkpoint": folder, "split": "test", **scores}
    result["seconds"] = round(time.time() - started, 1)
    if JSON.value:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    command_line.run(main)
