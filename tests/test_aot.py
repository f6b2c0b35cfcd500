"""Programs for TPUs that are not there: small models in this process, the paper's by the command."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hovle_jax.aot import plan
from hovle_jax.aot import report as reports
from hovle_jax.aot.compiling import TooLarge, compile_for
from hovle_jax.aot.forecasting import Forecast
from hovle_jax.aot.hlo.collectives import collectives, summary
from hovle_jax.aot.program import Program
from hovle_jax.aot.remedies import remedies
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.hardware.compiler_options import compiler_options
from hovle_jax.report.compiled import gb, text_of
from hovle_jax.sharding.mesh import make_mesh, torus
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import setup
from hovle_jax.training.flops import StepFlops
from hovle_jax.training.stages import STAGES
from hovle_jax.training.step import train_step, train_step_for
from hovle_jax.training.traffic import least_traffic
from tests import forked, micro
from tests.tpu_programs import ROOT, compiled, libtpu, small


@libtpu
@pytest.mark.parametrize(
    "stage, preset", [pytest.param("distill", "hovle_hd", marks=pytest.mark.slow), ("instruct", "hovle")]
)
def test_a_step_on_a_slice(stage, preset):
    report = compiled(stage, preset)
    assert (report.setting["devices"], report.setting["microbatches"], report.setting["mesh"]["fsdp"]) == (16, 2, 16)
    memory = report.memory
    assert report.fits and 0 < memory["arguments"] < memory["peak"] < memory["available"] == 16 * 2**30
    assert sum(report.arguments.values()) == pytest.approx(memory["arguments"], rel=0.25) and memory["host"] == 0
    used = report.attention
    assert used["embedding"]["implementation"] == "splash" and used["embedding"]["kernels"] == 3
    if stage == "distill":
        assert "64" in used["teacher"]["reason"] and set(used) == {"embedding", "teacher"}
    else:
        assert used["llm"]["kernels"] == 3
    assert {"all-gather", "reduce-scatter"} <= set(report.collectives)
    assert all(total.unknown == 0 for total in report.collectives.values())
    text, flops = text_of(report.to_dict()), report.step["flops"]
    assert f"{stage}:{preset} train on v5e-16: 16 devices, mesh fsdp=16" in text
    bound = f"at the published peak, {flops['model'] / flops['hardware']:.1%} MFU: what recomputation leaves"
    assert bound in text and "not a forecast" in text and "at best" not in text
    json.dumps(report.to_dict())


@libtpu
@pytest.mark.slow
def test_gradients_cross_slices_alone_and_the_report_says_how_often():
    report = compiled(rows=64, place=("v5e-16", 2))
    assert report.setting["mesh"] == {"data": 2, "fsdp": 16, "tensor": 1, "sequence": 1}
    beyond = {kind for kind, total in report.collectives.items() if total.dcn_bytes}
    assert beyond == {"all-reduce"} and report.step["dcn_seconds"] > 0
    # What goes between slices are the shards of the gradients that each device has, not whole ones, and once a step.
    between = sum(total.dcn_bytes for total in report.collectives.values())
    times = between / report.step["least"]["data"]
    assert 1 <= times < 1.05 and report.setting["microbatches"] == 2
    text = text_of(report.to_dict())
    assert f"{times:.1f} x the" in text and "of gradients summed once a step" in text


@libtpu
@pytest.mark.slow
def test_other_axes_keep_splash_attention():
    assert compiled(mesh=(("tensor", 2), ("sequence", 2))).attention["llm"]["kernels"] == 3


@libtpu
@pytest.mark.slow
def test_inputs_of_layers_can_wait_in_the_hosts_memory():
    report = compiled(execution=(("remat", "offload"),))
    assert report.memory["host"] > 0
    assert "in the host's memory" in text_of(report.to_dict())


@libtpu
@pytest.mark.parametrize("program, rows, length", [("prefill", 32, 512), ("decode", 64, 2048)])
def test_inference(program, rows, length):
    config = small("instruct", rows=rows, length=length)
    report = compile_for(config, topology.find("v5e-4"), program, new_tokens=64, with_forecast=False)
    assert report.setting["program"] == program and report.step is None and report.fits
    # What a prompt's rows are read in is a kernel; the mask of filled caches is not that of whole rows.
    used = ("splash", 1) if program == "prefill" else ("xla", 0)
    assert [(used["implementation"], used["kernels"]) for used in report.attention.values()] == [used] * 2
    caches = 2 * 2 * 2 * rows * (length + 64) * 128 * 2 / 4  # stacks, layers, keys and values, rows, room, width, bf16
    assert report.arguments["cache"] == pytest.approx(caches, rel=0.01)
    if program == "decode":  # which updates them in place
        assert report.memory["temporaries"] < caches / 16
    assert report.hbm_seconds == (report.arguments["cache"] + report.arguments["params"]) / 819e9
    text = text_of(report.to_dict())
    assert f"instruct:hovle {program} on v5e-4" in text and f"caches {gb(caches)} a device" in text
    with pytest.raises(UserError, match="distill gives no model that answers"):
        compile_for(small("distill"), topology.find("v5e-4"), program)


@libtpu
def test_a_kernel_that_the_program_does_not_have_is_not_reported():
    run = Program.of(small("instruct"), topology.find("v5e-4")).run
    used = reports._attention(small("instruct"), run, "train", ["jit(step)/LanguageModel/splash_mha_fwd"])
    assert (used["llm"]["implementation"], used["llm"]["kernels"]) == ("splash", 1)
    assert (used["embedding"]["implementation"], used["embedding"]["kernels"]) == ("xla", 0)
    assert "the program has none of its kernels" in used["embedding"]["reason"]


@libtpu
def test_what_a_run_holds_beside_a_program_must_fit_too():
    step = compiled("instruct", "hovle")
    assert step.beside == {"the next batch": step.arguments["batch"]}
    text = text_of(step.to_dict())
    assert f"beside it the next batch {gb(step.arguments['batch'])}" in text and "DOES NOT FIT" not in text
    room = step.memory["peak"] + step.arguments["batch"]
    for available, fits in ((room, True), (room - 1, False)):
        changed = dataclasses.replace(step, memory=step.memory | {"available": available})
        assert changed.fits == fits and ("DOES NOT FIT" in text_of(changed.to_dict())) != fits


@libtpu
@pytest.mark.slow
def test_evaluation_reads_a_batch_in_the_parts_of_a_step():
    """At once it takes the memory of 16 rows of a device, where a step takes that of one."""
    report = lambda **how: compile_for(small("instruct", rows=256, **how), topology.find("v5e-16"), "evaluation")
    whole, parts = report(execution={"accumulate": 1}), report()
    assert whole.memory["temporaries"] > 2 * parts.memory["temporaries"]
    assert set(whole.beside) == {"moments", "a batch to train on"} and whole.step is whole.hbm_seconds is None
    assert "instruct:hovle evaluation on v5e-16" in text_of(whole.to_dict())


@libtpu
def test_a_step_that_does_not_fit_names_its_size_and_what_takes_less():
    config = small("instruct", rows=16 * 1024, length=2048, execution={"remat": "none", "accumulate": 1})
    with pytest.raises(TooLarge, match=r"needs [\d.]+ GB of 16\.\d GB a device, with .* less: ") as error:
        compile_for(config, topology.find("v5e-16"))
    assert "--plan (compiles" in str(error.value) and error.value.needed > 16e9


def set_up_here(stage="instruct", rows=64, **execution):
    """-> (config, Run) of a micro run over the eight devices of this process, fsdp."""
    config = micro.run_config(stage, data=dict(batch_size=rows), mesh=MeshConfig(data=1, fsdp=8))
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, **execution))
    return config, setup.build(config, make_mesh(config.mesh))


def test_sizes_have_the_unit_that_shows_them():
    assert [gb(size) for size in (0, 4.5e6, 49.9e6, 50e6, 2.43e9)] == [
        "0.00 GB", "4.5 MB", "49.9 MB", "0.05 GB", "2.43 GB",
    ]  # fmt: skip


GIB = 2**30


def remedies_of(stage="instruct", rows=64, place="v5e-16", program="train", needed=20, batch=1, state=2, **execution):
    """What `remedies` says of a program that needs so many GiB of 16."""
    config, run = set_up_here(stage, rows, **execution)
    of_rows = "batch" if program == "train" else "cache"
    sizes = {"state": state * GIB, of_rows: batch * GIB}
    made = Program(config, run, topology.find(place), program)
    made.__dict__.update(sizes=sizes)  # in place of those of its arguments
    return remedies(made, needed * GIB, 16 * GIB)


def flags_of(said):
    return [sentence.split("--")[1].split(" ")[0].removeprefix("config.") for sentence in said]


def test_what_compiles_alone_can_tell_is_left_to_the_plan():
    assert flags_of(remedies_of(remat="dots", zero=1, accumulate=2)) == ["plan", "execution.zero=3", "topology=v5e-256"]
    plan_, larger = remedies_of(remat="full", accumulate=8)  # rows of 2 GiB cannot make up for 5
    assert plan_.startswith("--plan") and "256 chips a slice instead of 16" in larger
    assert flags_of(remedies_of("contrast", remat="offload", place="v5e-256", needed=17)) == []


def test_what_no_flag_of_the_execution_changes_is_not_tried_with_them():
    """State and batches alone do not fit: fewer rows do, or more chips. Of 64 rows 2 GiB of 16 are too many."""
    said = remedies_of(needed=16, batch=8, state=1, rows=64, place="v5e-16")
    assert flags_of(said) == ["data.batch_size=32", "topology=v5e-32"] and "its batch takes 17.2 GB" in said[0]
    assert flags_of(remedies_of(needed=9, batch=8, state=1, rows=64)) == ["data.batch_size=56", "topology=v5e-32"]
    fewer, larger = remedies_of(needed=20, batch=8, state=1, rows=64, program="decode")
    assert fewer.startswith("--config.data.batch_size=32 (fits: its cache takes 8.6 GB") and "v5e-32" in larger
    assert flags_of(remedies_of(needed=40, batch=8, state=20, rows=64, place="v5e-256")) == []


@pytest.mark.parametrize("zero", [3, 0])
def test_the_least_traffic_of_a_step(zero):
    """Kernels, counted by hand; of token tables what is looked up; gradients that are whole are summed once."""
    made, run = set_up_here(rows=32, zero=zero, accumulate=4)
    stage, config, width = STAGES["instruct"], run.models.config, 4  # bytes of float32, in which CPUs compute
    of = lambda chosen: sum(leaf.size * width for path, leaf in run.layout.leaves if chosen(path, leaf))
    is_sharded = lambda path: run.layout.is_sharded_by(path, "fsdp")
    trained = lambda path: stage.trains(path, config)
    vectors = of(lambda path, leaf: path[-1] not in ("kernel", "embedding") and is_sharded(path) and trained(path))
    pixels = of(lambda path, leaf: path[-2:] == ("patch_embedding", "kernel") and is_sharded(path))
    kernels = of(lambda path, leaf: path[-1] == "kernel" and is_sharded(path)) - pixels
    whole = of(lambda path, leaf: not is_sharded(path) and trained(path))
    assert (kernels > 0) == (zero == 3) and whole > 0
    least = 4 * (3 * kernels + 2 * vectors + 2 * pixels) * 7 / 8 + 2 * whole * 7 / 8
    vectors_of_tokens = 2 * 4 * made.data.sequence_length * config.embedding.stack.width * width  # of 4 rows; gradients
    least += vectors_of_tokens * 7 / 8 * (zero == 3)
    assert least_traffic(made, run) == {"fsdp": pytest.approx(least), "data": 0}


@libtpu
@pytest.mark.slow
def test_kernels_of_a_step_are_compiled_alone_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    report = compile_for(small("instruct"), topology.find("v5e-4"))
    low, high = report.forecast.kinds["kernels"]
    assert 0 < low < high < 2 * low and not any(
        "kernel" in what or "splash" in what for what in report.forecast.unknown
    )
    kept = sorted(tmp_path.rglob("*.json"))
    assert len(kept) == 2  # forward and backward, the same for both stacks
    assert {"embedding", "llm", "head and loss", "optimizer"} <= set(report.forecast.parts)
    assert 0 < report.speed["mfu"][0] <= report.speed["mfu"][1] < 0.8
    text = kept[0].read_text()
    kept[0].write_text(text.replace('"bundles": ', '"bundles": 1'))  # read from there the second time
    assert compile_for(small("instruct"), topology.find("v5e-4")).forecast.high > high
    assert "s by the compiler's schedule" in text_of(report.to_dict())


@libtpu
def test_a_report_shows_its_forecast():
    kinds, parts = {"matmul": (5.0, 5.0), "network": (1.0, 2.0)}, {"llm": (6.0, 7.0), "optimizer": (1e-3, 1e-3)}
    made = Forecast(6.0, 7.0, kinds, parts, {"gather": 0.02, "k: loops": None})
    target, flops = topology.find("v5e-16"), StepFlops(16 * 197e12 * 3.5, 16 * 197e12 * 4, {})
    speed = reports.speed_of(made, flops, target, 42_000)
    assert speed == {"mfu": (0.5, pytest.approx(3.5 / 6)), "tokens": (6000, 7000)}
    text = text_of(dataclasses.replace(compiled(), forecast=made, speed=speed).to_dict())
    assert "6 ... 7 s by the compiler's schedule, 50% ... 58% MFU, 6,000 ... 7,000 tokens/s" in text
    assert "by kind: matmul 5, network 1 ... 2" in text and "by part: llm 6 ... 7\n" in text
    assert "no estimate of gather, counted by its bytes: 2.0% of the time" in text and "of k: loops" in text
    assert "forecast  " not in text_of(compiled().to_dict())


@libtpu
def test_a_config_is_checked_before_anything_is_compiled():
    wrong = dataclasses.replace(small("instruct"), steps=0)
    for command in (
        lambda: compile_for(wrong, topology.find("v5e-4")),
        lambda: plan.make(wrong, topology.find("v5e-4")),
    ):
        with pytest.raises(UserError, match="steps=0 must be at least 1"):
            command()


@libtpu
def test_neighbours_on_the_torus_are_neighbours_on_the_mesh():
    devices = topology.find("v5e-256").devices()
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    assert torus(make_mesh(MeshConfig(data=1, fsdp=-1), shuffled)) == (16, 16)
    assert torus(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=4), shuffled)) == (16, 4)
    two = make_mesh(MeshConfig(data=1, fsdp=-1), topology.find("v5e-16", 2).devices())
    assert two.shape["data"] == 2 and [{d.slice_index for d in part.flat} for part in two.devices] == [{0}, {1}]
    assert torus(two) == (4, 4)
    with pytest.raises(UserError, match="fsdp=5, .* does not cover 16 devices of each of 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=5), topology.find("v5e-16", 2).devices())


@libtpu
@pytest.mark.parametrize(
    "name, kib", [("v5e-256", 32), ("v5e-256", 512), ("v5e-64", 128), ("v5p-128", 512), ("v6e-256", 512), ("v4-32", 32)]
)
def test_a_matmul_gathers_twice_and_scatters_once_on_every_torus(name, kib):
    """A shard of so many KiB; an all-reduce in place of any of the three would move twice its bytes."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology.find(name).devices())
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape in ((mesh.size, 256, 1024), (1024, kib * mesh.size // 2), (mesh.size, 256, kib * mesh.size // 2))
    ]
    matmul = Placement(mesh).matmul
    forward = lambda x, kernel, dy: matmul(x, kernel, ("embed", "mlp"))
    backward = lambda x, kernel, dy: jax.vjp(lambda x, kernel: forward(x, kernel, dy), x, kernel)[1](dy)
    options = compiler_options(mesh.devices.flat[0].device_kind)
    texts = [jax.jit(f).lower(*arrays).compile(options).as_text() for f in (forward, backward)]
    sent = sum(total.bytes for text in texts for total in summary(collectives(text)).values())
    least = 3 * (mesh.size - 1) * kib * 1024
    assert least <= sent <= 17 / 16 * least  # where a matmul goes in windows, one part is sent once more
    if options and kib == 512:  # the options hand all of them to another core
        calls = sum(text.count('async_execution_thread="sparsecore"') for text in texts)
        assert calls >= 3


SLICES = [f"{generation}-{chips}" for generation in ("v5e", "v6e") for chips in (8, 16, 32, 64, 128, 256)]
SLICES += [f"v5p-{cores}" for cores in (16, 32, 64, 128, 256)] + ["v4-32", "v4-64"]


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_a_kernel_is_gathered_and_not_reduced_on_every_slice(name):
    """Shards of 64 to 512 KiB along either dimension: those of the paper's kernels on these slices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology.find(name).devices())
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    array = lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    options = compiler_options(mesh.devices.flat[0].device_kind)
    for kib, axes in itertools.product((64, 128, 256, 512), (("embed", "mlp"), ("mlp", "embed"))):
        shape, sharding = (2048, kib * mesh.size // 4), place("fsdp")
        if axes[1] == "embed":
            shape, sharding = shape[::-1], place(None, "fsdp")
        matmul = functools.partial(Placement(mesh).matmul, axes=axes)
        rows = array((mesh.size, 256, shape[0]), place("fsdp"))
        text = jax.jit(matmul).lower(rows, array(shape, sharding)).compile(options).as_text()
        found, least = summary(collectives(text)), (mesh.size - 1) * kib * 1024
        assert "all-reduce" not in found, (name, kib, axes)
        assert least <= sum(total.bytes for total in found.values()) <= 17 / 16 * least, (name, kib, axes)


@libtpu
def test_what_a_step_is_compiled_with_where_its_collectives_would_stop_the_matmuls():
    def run(name, **execution):
        config = small("instruct", execution=execution)
        return setup.build(config, make_mesh(config.mesh, topology.find(name).devices()))

    v5e, v6e = run("v5e-16"), run("v6e-16")
    assert len(v6e.compiler_options()) == 3 and not v5e.compiler_options()
    assert train_step_for(v5e) is train_step and train_step_for(v6e) is not train_step
    assert not run("v6e-16", sparse_cores=False).compiler_options()
    more = run("v6e-16", sparse_cores=False, scoped_vmem=True).compiler_options()
    assert more == {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    assert len(run("v6e-16", scoped_vmem=True).compiler_options()) == 4
    assert len(run("v5p-16", scoped_vmem=True).compiler_options()) == 3


@libtpu
@pytest.mark.slow
def test_fusions_with_more_vector_memory_take_fewer_cycles():
    """By the compiler's own estimate, in the products of a feed-forward layer."""
    device = topology.find("v6e-4").devices()[0]
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    for sizes in ((4096, 2048, 8192), (4096, 8192, 2048)):
        lowered = jax.jit(jnp.matmul).lower(array(*sizes[:2]), array(*sizes[1:]))
        default, ours = (
            sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', lowered.compile(options).as_text())))
            for options in ({}, compiler_options(device.device_kind, sparse_cores=False, scoped_vmem=True))
        )
        assert 0 < ours < 0.97 * default


def command(*arguments, **environment):
    """Runs the command -> (status, stdout, stderr)."""
    done = forked.run("hovle_jax.aot", arguments, ROOT, os.environ | environment, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config is missing"),
        (["--config=configs/instruct.py:hovle"], "--topology is missing"),
        (["--config=configs/instruct.py:hovle", "--topology=v5e-17"], "no slice that v5e has; the nearest are"),
        (["--config=configs/instruct.py:hovle", "--topology=v5e-16", "--slices=0"], "--slices=0 must be at least 1"),
        (["--config=configs/nothing.py", "--topology=v5e-16"], "no config file at"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    status, _, err = command(*arguments)
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("fits, status", [(True, 0), (False, 1)])
def test_a_program_that_does_not_fit_has_a_status(fits, status):
    """Most of them the compiler refuses; of what it accepts the report may still say so."""
    code = f"""
import types
from hovle_jax.aot import __main__ as aot, compiling
from hovle_jax.report import compiled
from hovle_jax.system import command_line
compiling.compile_for = lambda *_: types.SimpleNamespace(to_dict=lambda: {{"fits": {fits}}})
compiled.text_of = lambda report: "the report"
command_line.run(aot.main, memory=lambda: None)
"""
    call = [sys.executable, "-c", code, "--config=configs/instruct.py:hovle", "--topology=v5e-4"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (status, "the report\n"), done.stderr


@libtpu
def test_json_is_all_that_stdout_gets_and_stderr_says_how_long_it_takes():
    small = [
        "--program=decode",
        "--new_tokens=8",
        "--config.data.batch_size=4",
        "--config.model.llm.stack.num_layers=1",
    ]
    small += ["--config.model.embedding.stack.num_layers=1", "--config.execution.unroll_layers=False"]
    status, out, err = command("--config=configs/instruct.py", "--topology=v5e-4", "--json", *small)
    assert status == 0 and json.loads(out)["setting"]["program"] == "decode", err
    lines = [line for line in err.splitlines() if line.startswith("compiling instruct:tiny decode for v5e-4")]
    assert lines[0].endswith("...") and ": done in 0:0" in lines[-1]


@libtpu
@pytest.mark.slow
def test_the_papers_step_on_a_slice_fits_and_is_bound_by_its_matmuls():
    """On the smallest slice, which compiles soonest and has the least memory and the most microbatches."""
    status, out, err = command(
        "--config=configs/instruct.py:hovle", "--topology=v5e-16", "--json", "--config.data.sequence_length=4096"
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["fits"] and (report["setting"]["rows"], report["setting"]["microbatches"]) == (4096, 256)
    # Forward, again, and one for gradients.
    assert all(used["kernels"] == 3 for used in report["attention"].values())
    step = report["step"]
    assert 1 <= step["excess"] <= 1.15
    assert step["flops"]["model"] / step["flops"]["hardware"] >= 0.6 and step["bound"] < report["forecast"]["low"]
