"""Compiles a run's program for TPUs that are not there, and says whether it fits and what it sends.

    python -m hovle_jax.aot --config configs/instruct.py:hovle --topology v5e-256
    python -m hovle_jax.aot --config configs/instruct.py:hovle --topology v5e-256 --slices 2 --json
    python -m hovle_jax.aot --config configs/instruct.py:hovle --topology v5e-16 --plan
    python -m hovle_jax.aot --config configs/instruct.py:hovle --topology v5e-4 --program decode \
        --config.data.batch_size=64

It is the real program of `hovle_jax.train`, compiled by libtpu from shapes alone: no weights, no data, no TPU. Needs
the extra: pip install 'hovle_jax[tpu]'. What is reported is described in docs/performance.md. The exit status is 1
where nothing fits, 2 where the program cannot be compiled.
"""

import functools
import json
import sys

from absl import flags
from ml_collections import config_flags

from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.system import command_line, malloc
from hovle_jax.system.progress import waiting

CONFIG = config_flags.DEFINE_config_file("config", None, "A stage's config file: configs/instruct.py:hovle")
TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice, as 'v5e-256', 'v5p-128' or 'v5e:16x16'")
SLICES = flags.DEFINE_integer("slices", 1, "How many such slices, connected by the data-centre network")
PROGRAM = flags.DEFINE_enum("program", "train", ("train", "evaluation", "prefill", "decode"), "What to compile")
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 512, "prefill, decode: room after the prompts in the caches", lower_bound=1
)
PLAN = flags.DEFINE_bool("plan", False, "Try remat and microbatches, and recommend the fastest that fits")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of text")


def main() -> None:
    command_line.config_file()
    config = RunConfig.from_dict(CONFIG.value.to_dict())
    if SLICES.value < 1:
        raise UserError(f"--slices={SLICES.value} must be at least 1")
    if PLAN.value and PROGRAM.value != "train":
        raise UserError("--plan chooses how to train; leave out --program")

    from hovle_jax.aot import compiling, plan
    from hovle_jax.hardware import topology
    from hovle_jax.report.compiled import plan_text, text_of
    from hovle_jax.training.checks import check

    check(config)
    target = topology.find(command_line.required("topology"), SLICES.value)
    say = functools.partial(print, file=sys.stderr, flush=True)
    name = f"{config.stage}:{config.preset}"
    if PLAN.value:
        with waiting(f"planning {name} on {target.name}", say):
            made = plan.to_dict(plan.make(config, target, say))
        text, fits = plan_text(made), made["best"] is not None
    else:
        with waiting(f"compiling {name} {PROGRAM.value} for {target.name}", say):
            made = compiling.compile_for(config, target, PROGRAM.value, NEW_TOKENS.value).to_dict()
        text, fits = text_of(made), made["fits"]
    print(json.dumps(made, indent=2) if JSON.value else text)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    command_line.run(main, memory=malloc.share_freed_memory, config=RunConfig, platform="cpu")
