"""The forecast against steps whose time others have measured and published: the table of docs/forecast.md.

    python -m tests.benchmarks.forecast_calibration [--only NAME ...] [--out DIR]

Each case is a public run of MaxText, rebuilt from this project's layers: the same sizes, batch, length, chips and
compiler flags. What differs is said in the table. Compiled by a process of its own, one after the other, one to ten
minutes each; what DIR holds already is not compiled again. Needs the extra `tpu` and no TPU.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"  # MaxText's DENSE_VMEM_LIMIT_FLAG
RECIPES = "github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/trillium/"
CONFIGS = "github.com/AI-Hypercomputer/maxtext/tree/main/src/maxtext/configs/tpu/"


@dataclasses.dataclass(frozen=True)
class Case:
    """A published step.

    Attributes:
      stack: layers, width, heads, kv heads, mlp width; heads are 128 wide.
      rows, length: of a device.
      measured: seconds a step; of those published as TFLOP/s see `maxtext_seconds`.
      differs: from the published run.
    """

    topology: str
    stack: tuple[int, int, int, int, int]
    vocab: int
    rows: int
    length: int
    measured: float
    source: str
    remat: str = "full"
    vocab_chunk: int = 0
    tensor: int = 1
    flags: str = ""
    differs: str = ""


def maxtext_seconds(stack, vocab, rows, length, tera):
    """From TFLOP/s a device, by MaxText's count at the time: three times the forward pass, attention not halved."""
    layers, width, heads, kv_heads, mlp = stack
    weights = 3 * width * mlp + width * 128 * (2 * heads + 2 * kv_heads)
    forward = 2 * rows * length * (layers * weights + width * vocab) + 4 * rows * length**2 * layers * heads * 128
    return 3 * forward / (tera * 1e12)


_8B = (32, 4096, 32, 8, 14336)
_16B, _32B, _128B = (32, 4096, 64, 64, 28672), (32, 8192, 64, 64, 28672), (64, 8192, 128, 128, 57344)
_OFFLOADS = "keeps query, key, value and output in the host's memory: recomputes less; blocks of 2,048; whole head"
CASES = {
    "Llama-3.1-8B": Case(
        "v6e-8", _8B, 128256, 3, 8192, 3.443, f"{RECIPES}Llama3.1-8B-MaxText/v6e-8", vocab_chunk=8192, flags=VMEM,
        differs=_OFFLOADS,
    ),
    "Mistral-7B": Case(
        "v6e-8", _8B, 32768, 6, 8192, 6.320, f"{RECIPES}Mistral-7B-MaxText", remat="offload", vocab_chunk=8192,
        flags=VMEM, differs=_OFFLOADS,
    ),
    "Llama-3.1-8B, 256 chips": Case(
        "v6e-256", _8B, 128256, 4, 8192, 4.546, f"{RECIPES}Llama3.1-8B-MaxText/v6e-256", vocab_chunk=8192, flags=VMEM,
        differs=_OFFLOADS,
    ),
    "MaxText 16B": Case(
        "v5e-256", _16B, 32000, 6, 2048, maxtext_seconds(_16B, 32000, 6, 2048, 120), f"{CONFIGS}v5e",
    ),
    "MaxText 32B": Case(
        "v5e-256", _32B, 32000, 4, 2048, maxtext_seconds(_32B, 32000, 4, 2048, 132), f"{CONFIGS}v5e",
    ),
    "MaxText 128B": Case(
        "v5p-256", _128B, 32000, 1, 2048, maxtext_seconds(_128B, 32000, 1, 2048, 315), f"{CONFIGS}v5p", remat="dots",
        tensor=8,
    ),
}  # fmt: skip


def config_of(case, devices):
    """The run of this project that is nearest to the case."""
    from hovle_jax import train
    from hovle_jax.model.config import StackConfig

    replace = dataclasses.replace
    config = train.stage_config(ROOT / "configs", "pretrain", "tiny")
    layers, width, heads, kv_heads, mlp = case.stack
    stack = StackConfig(layers, width, heads, kv_heads, 128, mlp)
    llm = replace(config.model.llm, stack=stack, vocab_size=case.vocab, max_length=case.length, tied=False)
    unused = config.model.embedding
    assert unused is not None
    unused = replace(unused, stack=replace(unused.stack, width=width), vocab_size=case.vocab)
    execution = replace(
        config.execution, remat=case.remat, accumulate=1, vocab_chunk=case.vocab_chunk, unroll_layers=False
    )
    return replace(
        config,
        model=replace(config.model, llm=llm, embedding=unused),
        tokenizer=replace(config.tokenizer, vocab_size=case.vocab),
        data=replace(config.data, batch_size=case.rows * devices, sequence_length=case.length),
        mesh=replace(config.mesh, data=1, fsdp=-1, tensor=case.tensor),
        execution=execution,
    )


def attend_by_jax():
    """Has this process attend as these runs did: by JAX's kernels alone, those for keys and for queries apart."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from hovle_jax.model import splash

    def kernel(heads, length, causal, head_shards, length_shards):
        assert causal and length_shards == 1
        size = splash.block_of(length)
        of_all = dict.fromkeys(
            ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size
        )
        sizes = kernels.BlockSizes(**of_all, block_kv_compute=splash.KEY_STEP)
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
        return kernels.make_splash_mha(mask, head_shards=head_shards, q_seq_shards=1, block_sizes=sizes)

    splash.forward_kernel = kernel
    splash.attend = lambda kernel, *arrays: splash._forward(kernel, *arrays[:5])


def compiled(case):
    """-> the case's step, compiled."""
    from hovle_jax.aot.program import Program
    from hovle_jax.hardware import topology

    attend_by_jax()
    target = topology.find(case.topology)
    config = config_of(case, target.chips)
    program = Program.of(config, target)
    options = program.options() | dict(flag.removeprefix("--").split("=") for flag in case.flags.split())
    return program.lower().compile(options)


def forecast_of(name):
    """Prints the forecast as JSON."""
    from hovle_jax.aot import forecast

    print(json.dumps(dataclasses.asdict(forecast(compiled(CASES[name])))))


def row(name, case, found):
    low, high = found["low"], found["high"]
    errors = [seconds / case.measured - 1 for seconds in (low, (low + high) / 2, high)]
    told = " ... ".join(f"{error:+.0%}" for error in errors)
    return f"| {name} | {case.topology} | {case.measured:.2f} | {low:.2f} ... {high:.2f} | {told} | {case.differs} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("forecasts"))
    parser.add_argument("--alone", help="compile this case in this process, and print its forecast as JSON")
    given = parser.parse_args()
    if given.alone:
        return forecast_of(given.alone)
    given.out.mkdir(exist_ok=True)
    print("| step | chips | measured, s | forecast, s | low, middle, high against it | what was otherwise there |")
    print("| :--- | :--- | ---: | ---: | :--- | :--- |")
    for name in given.only:
        kept = given.out / f"{name.replace(' ', '_')}.json"
        if not kept.exists():
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": CASES[name].flags}
            command = [sys.executable, "-m", "tests.benchmarks.forecast_calibration", "--alone", name]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            kept.write_text(done.stdout.splitlines()[-1])
        print(row(name, CASES[name], json.loads(kept.read_text())), flush=True)


if __name__ == "__main__":
    main()
