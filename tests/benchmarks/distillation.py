"""What distillation is for: the tiny chain with and without stage 1, at equal later steps.

    python tests/benchmarks/distillation.py --workdir runs_compare

Trains both chains (each about as long as the README's command; what a folder already has is not trained again), prints
one JSON object and plots the instruct stage's losses to WORKDIR/distillation.png.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from hovle_jax.report.metrics import read_metrics
from hovle_jax.report.plots import plot_comparison

PRESETS = {"with distillation": "tiny", "without": "tiny_no_distill"}


def train(preset, workdir):
    """Seconds that the chain took."""
    started = time.time()
    command = [sys.executable, "-m", "hovle_jax.train", "--config", f"configs/instruct.py:{preset}"]
    subprocess.run([*command, "--workdir", str(workdir)], check=True, stdout=sys.stderr)
    return round(time.time() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs_compare"))
    workdir = parser.parse_args().workdir
    report = {}
    for name, preset in PRESETS.items():
        seconds = train(preset, workdir / preset)
        scores = json.loads((workdir / preset / "instruct" / "results.json").read_text())
        report[name] = scores | {"seconds": seconds}
    runs = {name: read_metrics(workdir / preset / "instruct") for name, preset in PRESETS.items()}
    plot_comparison({"loss": ("loss", runs)}, workdir / "distillation.png")
    report["error ratio (without / with)"] = round(
        (100 - report["without"]["accuracy"]) / max(100 - report["with distillation"]["accuracy"], 1e-3), 2
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
