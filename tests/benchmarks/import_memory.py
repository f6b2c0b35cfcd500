"""Peak host memory of a public checkpoint's way in and out, against the checkpoint's size.

    python tests/benchmarks/import_memory.py --gigabytes 1

Writes a Llama of random float32 values in two files and prints one JSON object: the peaks of `load` onto one device, of
the command `import` and of the command `export`, each in a process of its own. A peak is the process's whole resident
memory, Python and JAX included; on a CPU it has the device's in it.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np


def config_of(gigabytes):
    """A public Llama config of about so many bytes."""
    layers = max(1, round(gigabytes * 10**9 / 4 / 12.6e6))
    return {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }


def write(folder, public):
    """-> bytes of all tensors."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from hovle_jax.components import unboxed
    from hovle_jax.conversion.exporting import make_index
    from hovle_jax.formats import llms
    from hovle_jax.formats.mapping import to_public
    from hovle_jax.model.execution import Execution
    from hovle_jax.model.hovle import LanguageModel

    config = llms.config_from_json(public)
    row = jnp.zeros((1, 2), jnp.int32)
    params = unboxed(jax.eval_shape(LanguageModel(config, Execution()).init, jax.random.key(0), row, row, row))
    tensors = jax.eval_shape(lambda p: to_public(llms.rules(config), p), params["params"])
    shapes = {name: x.shape for name, x in tensors.items()}
    total = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    index, rng = make_index(shapes, np.dtype(np.float32), shard_bytes=total // 2 + 10**8), np.random.default_rng(0)
    for file in sorted(set(index["weight_map"].values())):
        names = [name for name, at in index["weight_map"].items() if at == file]
        save_file({name: rng.random(shapes[name], np.float32) for name in names}, folder / file)
    (folder / "config.json").write_text(json.dumps(public))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak():
    """Largest resident size of this process so far, bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def read(folder):
    """In the child: what the process takes before, and at most while reading."""
    from hovle_jax.system import malloc

    malloc.keep_freed_memory()
    import jax

    from hovle_jax.checkpoints import abstract_component
    from hovle_jax.config import MeshConfig, ModelConfig
    from hovle_jax.formats.families import open_checkpoint
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.sharding.placement import Placement

    checkpoint = open_checkpoint(folder)
    abstract = abstract_component(ModelConfig(llm=checkpoint.config), "llm", Placement(make_mesh(MeshConfig())))
    before = peak()
    jax.block_until_ready(checkpoint.load_component("llm", abstract))
    print(json.dumps({"before": before, "peak": peak()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return read(options.child)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "public").mkdir()
        total = write(folder / "public", config_of(options.gigabytes))
        child = subprocess.run(
            [sys.executable, __file__, "--child", folder / "public"], check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
        peaks = {"load": found["peak"]}
        for action, source, target in (("import", "public", "ours"), ("export", "ours", "back")):
            peaks[action] = peak_of_command(action, folder / source, folder / target)
    report = {"checkpoint bytes": total, "process before loading": found["before"], "peaks": peaks}
    report |= {f"peak of {name} / checkpoint": round(size / total, 3) for name, size in peaks.items()}
    print(json.dumps(report, indent=2))


def peak_of_command(action, source, target):
    """-> bytes."""
    process = subprocess.Popen([sys.executable, "-m", "hovle_jax.convert", action, source, target], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{action} failed")
    return 1024 * usage.ru_maxrss


if __name__ == "__main__":
    main()
