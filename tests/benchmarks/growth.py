"""How a step grows: tokens/s, memory and compile time against layers, sequence, tiles, vocabulary and devices.

    python tests/benchmarks/growth.py --out runs/growth

Runs the real `train_step` of `instruct` on a small HoVLE with scanned layers, one axis at a time around `BASE`, each
point in a process of its own (device counts and allocations do not survive a process), one after another. Writes
growth.json and growth.png to the folder, and prints tables and how compile time grows with layers.

Devices are the CPU's own cores cut into fake ones (`fsdp` over all of them, rows per device constant), so tokens/s over
devices shows what cutting costs and not what devices bring; memory per device and compile time are real. Memory is
what the compiler plans for a device: arguments and temporaries. Compile time is the work of all threads, tracing
included, without a cache; growth.json has the time on the clock too.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

from hovle_jax import recipes
from hovle_jax.config import ExecutionConfig, MeshConfig, RunConfig
from hovle_jax.data.batch import BatchShape, Sample, stack
from hovle_jax.data.kinds import CONVERSATIONS
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig, LLMConfig, StackConfig
from hovle_jax.system import malloc


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of the model and its batch.

    Attributes:
      layers: of each of the two stacks.
      sequence: tokens of a row, of which 16 for each tile are visual.
      devices: fake ones of the CPU.
      rows: of the batch, per device.
      compilations: how often it is compiled; the least time counts.
    """

    layers: int = 2
    sequence: int = 256
    tiles: int = 1
    vocabulary: int = 1024
    devices: int = 1
    width: int = 128
    rows: int = 2
    compilations: int = 2


BASE, QUICK_BASE = Point(), Point(sequence=64, vocabulary=320, width=32, rows=1, compilations=1)
AXES = {
    "layers": (2, 4, 8, 16, 32),
    "sequence": (128, 256, 512, 1024, 2048),
    "tiles": (1, 2, 4, 7, 13),
    "vocabulary": (1024, 4096, 16384, 65536),
    "devices": (1, 2, 4, 8),
}
QUICK_AXES = {"layers": (2, 8), "sequence": (64, 128), "tiles": (1, 2), "vocabulary": (320, 640), "devices": (1, 2)}
# field -> (title with its unit, how to read a number of the JSON, scale)
MEASURES = {
    "tokens_per_second": ("tokens/s", 1.0, "log"),
    "bytes_per_device": ("memory per device, MB", 1e-6, "log"),
    "compile_cpu_seconds": ("compile time, CPU s", 1.0, "linear"),
}
TILE, PATCH = 64, 8
SEEN_STEPS, LEAST_STEPS, LEAST_SECONDS = 2, 5, 2.0

# ---------------------------------------------------------------------------------------------------------------------
# One point, in a process of its own


def run_config(point):
    """`instruct` on a HoVLE of these sizes, on the CPU's implementations."""
    heads = 4
    layers = StackConfig(
        num_layers=point.layers,
        width=point.width,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=point.width // heads,
        mlp_width=2 * point.width,
    )
    embedding = EmbeddingConfig(stack=layers, image_size=TILE, patch_size=PATCH, vocab_size=point.vocabulary)
    llm = LLMConfig(stack=layers, vocab_size=point.vocabulary, max_length=point.sequence)
    config = RunConfig.from_dict(recipes.base("instruct", "tiny").to_dict())
    return dataclasses.replace(
        config,
        model=HoVLEConfig(embedding=embedding, llm=llm),
        data=dataclasses.replace(config.data, sequence_length=point.sequence, tiles=point.tiles),
        mesh=MeshConfig(data=1, fsdp=point.devices),
        execution=ExecutionConfig(attention="blocks"),
    )


def random_batch(config, rows):
    """Rows filled to the end: all tiles first, then text, whose second half is supervised."""
    image_id, rng = 0, np.random.default_rng(0)
    embedding = config.model.embedding
    shape = BatchShape.of(config.data, embedding, image_id)
    visual = shape.tiles * shape.tokens_per_tile
    made = []
    for _ in range(rows):
        tokens = rng.integers(1, embedding.vocab_size, shape.length).astype(np.int32)
        tokens[:visual] = image_id
        supervised = np.arange(shape.length) >= (visual + shape.length) // 2
        tiles = rng.integers(0, 256, (shape.tiles, TILE, TILE, 3), dtype=np.uint8)
        made.append(CONVERSATIONS.row([Sample(tokens, supervised, tiles)], shape))
    return stack(made)


def measure(point):
    """-> a row of the JSON: the point's fields and its measures."""
    malloc.keep_freed_memory()
    import jax

    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.training.setup import build
    from hovle_jax.training.stages import STAGES
    from hovle_jax.training.state import make_state
    from hovle_jax.training.step import train_step

    config = run_config(point)
    rows = point.rows * point.devices
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    run, batch, rng = build(config, make_mesh(config.mesh)), random_batch(config, rows), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0, 0.02, leaf.shape).astype(np.float32), leaf.sharding),
        run.abstract_params(),
    )
    state, batch = make_state(STAGES[config.stage], run, params), run.placement.put_batch(batch)
    lower = lambda: train_step.lower(state, batch, stage=config.stage, run=run)
    step, compilation = time_compilation(lower, point.compilations)
    seconds = time_steps(step, state, batch)
    memory = step.memory_analysis()
    return dataclasses.asdict(point) | {
        "tokens_per_second": rows * point.sequence / seconds,
        "bytes_per_device": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "seconds_per_step": seconds,
        **compilation,
    }


def time_compilation(lower, times):
    """-> (the compiled step, {measure: seconds to trace and compile it}), the least of so many times.

    The work of all threads is measured beside the time on the clock, as other processes disturb it less.
    """
    import jax

    seconds, work = [], []
    for _ in range(times):
        jax.clear_caches()
        started, worked = time.perf_counter(), time.process_time()
        compiled = lower().compile()
        seconds.append(time.perf_counter() - started)
        work.append(time.process_time() - worked)
    return compiled, {"compile_seconds": min(seconds), "compile_cpu_seconds": min(work)}


def time_steps(step, state, batch):
    """The median time of a step in seconds, after a few that are not counted."""
    import jax

    seconds = []
    while len(seconds) < SEEN_STEPS + LEAST_STEPS or sum(seconds) < LEAST_SECONDS:
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    if not np.isfinite(float(metrics["loss"])):
        raise SystemExit("the loss is not finite: these are no times of a step that trains")
    return statistics.median(seconds[SEEN_STEPS:])


# ---------------------------------------------------------------------------------------------------------------------
# All points


def in_a_process(point):
    """`measure` in a child with the point's number of devices, which compiles everything itself."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={point.devices}",
    }
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(point))]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(child.stdout.splitlines()[-1])


def run_axes(base, axes):
    """-> {axis: rows of the JSON}; a point that several axes share is measured once."""
    measured, found = {}, {}
    for axis, values in axes.items():
        found[axis] = []
        for value in values:
            point = dataclasses.replace(base, **{axis: value})
            if point not in measured:
                measured[point] = in_a_process(point)
            found[axis].append(measured[point])
        print(table(axis, found[axis]), flush=True)
    return found


def table(axis, rows):
    """One axis as aligned text."""
    lines = [" ".join(f"{name:>24}" for name in [axis, *(title for title, *_ in MEASURES.values())])]
    for row in rows:
        values = [row[name] * unit for name, (_, unit, _) in MEASURES.items()]
        lines.append(" ".join([f"{row[axis]:>24}", *(f"{value:>24.4g}" for value in values)]))
    return "\n".join(lines) + "\n"


def compile_growth(rows):
    """How compile time grows from the fewest layers to the most, as a sentence."""
    first, last = rows[0], rows[-1]
    ratio = last["compile_cpu_seconds"] / first["compile_cpu_seconds"]
    return f"compile time, {last['layers']} layers / {first['layers']} layers: {ratio:.2f}"


def draw(found, path):
    """A column for each axis, a row for each measure; a measure has one scale in all columns."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    from hovle_jax.report.plots import COLOR

    figure = Figure(figsize=(2.6 * len(found), 6.2), dpi=100, layout="constrained")
    grid = figure.subplots(len(MEASURES), len(found), sharex="col", sharey="row", squeeze=False)
    for (name, (title, unit, scale)), axes in zip(MEASURES.items(), grid):
        axes[0].set_ylabel(title, fontsize=9)
        for axis, (x, rows) in zip(axes, found.items()):
            axis.plot([row[x] for row in rows], [row[name] * unit for row in rows], color=COLOR, marker=".")
            axis.set_xscale("log", base=2)
            axis.set_yscale(scale)
            if scale == "log":
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.yaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_locator(FixedLocator([row[x] for row in rows]))
            axis.set_xticklabels([f"{row[x] // 1024}k" if row[x] >= 1024 else row[x] for row in rows])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        if scale == "linear":
            axes[0].set_ylim(bottom=0)  # for the whole row, when all of it is drawn
    for axis, x in zip(grid[-1], found):
        axis.set_xlabel(x, fontsize=9)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/growth"), help="folder to write to")
    parser.add_argument("--axes", default=",".join(AXES), help="those to run, of %(default)s")
    parser.add_argument("--quick", action="store_true", help="two points of a tiny model an axis: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Point(**json.loads(options.child)))))
        return
    base, axes = (QUICK_BASE, QUICK_AXES) if options.quick else (BASE, AXES)
    found = run_axes(base, {axis: axes[axis] for axis in options.axes.split(",")})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "growth.json").write_text(json.dumps({"cores": os.cpu_count(), "axes": found}, indent=2) + "\n")
    draw(found, options.out / "growth.png")
    if "layers" in found:
        print(compile_growth(found["layers"]))


if __name__ == "__main__":
    main()
