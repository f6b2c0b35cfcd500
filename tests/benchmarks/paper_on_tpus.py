"""The paper's stages compiled for TPU slices: the table of docs/performance.md.

    python tests/benchmarks/paper_on_tpus.py [--out DIR] [--only instruct:hovle@v5e-256] [--jobs 2]

Each program is compiled by `python -m hovle_jax.aot --json` in a process of its own, a minute or more each; what DIR
holds already is not compiled again. Prints the table, and puts it into docs/performance.md between its marks once all
of it is there. Needs the extra `tpu` and no TPU.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import subprocess
import sys

from hovle_jax.report.compiled import span

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- paper_on_tpus.py writes what follows -->\n", "<!-- as far as here -->\n")
STAGES, PRESETS = ("distill", "align", "instruct"), ("hovle", "hovle_hd")
PLACES = (("v5e-16", 1), ("v5e-256", 1), ("v5p-128", 1), ("v6e-256", 1), ("v5e-256", 2))
OF_HD = PLACES[1:3]  # its programs differ from the others' in the longer stream alone
LENGTH = 4096  # tokens of a row (HD: of the short stream)
HEAD = (
    ("step", "slices", "memory, GB", "attention", "sent / least", "bound, s", "forecast, s", "MFU"),
    (":---", ":---", "---:", ":---", "---:", "---:", "---:", "---:"),
)


def name_of(stage, preset, topology, slices):
    return f"{stage}:{preset}@" + (f"{slices}x" if slices > 1 else "") + topology


def programs():
    """{name: arguments of the command}."""
    made = {}
    for stage, preset, (topology, slices) in itertools.product(STAGES, PRESETS, PLACES):
        if preset == "hovle_hd" and (topology, slices) not in OF_HD:
            continue
        made[name_of(stage, preset, topology, slices)] = [
            f"--config={ROOT}/configs/{stage}.py:{preset}", f"--topology={topology}", f"--slices={slices}", "--json",
            f"--config.data.sequence_length={LENGTH}",
        ]  # fmt: skip
    return made


def compiled(name, arguments, folder):
    """The report of a program as a dict, from the folder or by the command."""
    kept = folder / f"{name.replace(':', '_')}.json"
    if not kept.exists():
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "hovle_jax.aot", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if not done.stdout:  # what does not fit has a report and the status 1
            return {"error": done.stderr.strip().splitlines()[-1]}
        kept.write_text(done.stdout)
        print(f"{name}: compiled in {json.loads(done.stdout)['setting']['compile_seconds']:.0f} s", flush=True)
    return json.loads(kept.read_text())


def row(name, report):
    """Cells of a line of the table."""
    step, place = name.split("@")
    if "error" in report:
        return (step, place, report["error"], *[""] * 5)
    memory, made, forecast = report["memory"], report["step"], report["forecast"]
    attention = ", ".join(f"{stack} {used['implementation']}" for stack, used in report["attention"].items())
    return (
        step,
        place.replace("2x", "2 x "),
        f"{memory['peak'] / 1e9:.1f} of {memory['available'] / 1e9:.1f}" + " (too large)" * (not report["fits"]),
        attention,
        f"{made['excess']:.2f}",
        f"{made['bound']:.2f}",
        span((forecast["low"], forecast["high"]), ".2f"),
        span(report["speed"]["mfu"], ".0%"),
    )


def table(reports):
    rows = [*HEAD, *(row(name, report) for name, report in reports.items())]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def write(page, text):
    """Replaces what stands between the marks of the page."""
    whole = page.read_text()
    before, rest = whole.split(MARKS[0])
    page.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs_aot"), help="folder of the reports")
    parser.add_argument("--only", nargs="*", help="names of programs, as instruct:hovle@v5e-256 or @2xv5e-256")
    parser.add_argument("--jobs", type=int, default=2, help="how many are compiled at a time")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = {name: flags for name, flags in programs().items() if not arguments.only or name in arguments.only}
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        made = {name: pool.submit(compiled, name, flags, arguments.out) for name, flags in wanted.items()}
        reports = {name: future.result() for name, future in made.items()}
    text = table(reports)
    print(text)
    failed = [name for name, report in reports.items() if "error" in report]
    if not arguments.only and not failed:
        write(PAGE, text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
