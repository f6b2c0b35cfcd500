"""Programs for TPUs that are not there: small models in this process, the paper's by the command."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hovle_jax.aot import plan
from hovle_jax.aot.hlo.collectives import collectives, summary
from hovle_jax.aot.report import text_of
from hovle_jax.aot.target import Target, TooLarge, compile_for
from hovle_jax.config import MeshConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.hardware.compiler_options import compiler_options
from hovle_jax.sharding.mesh import make_mesh, torus
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import setup
from hovle_jax.training.step import train_step, train_step_for
from tests.tpu_programs import ROOT, small

libtpu = pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed (the extra 'tpu')")


@functools.cache
def compiled(stage="instruct", preset="hovle", place=("v5e-16", 1), execution=(), mesh=(), **sizes):
    """The report of a small step; `execution` and `mesh` are pairs of names and values."""
    config = small(stage, preset, execution=dict(execution), **sizes, **dict(mesh))
    return compile_for(config, Target.of(*place))


@libtpu
@pytest.mark.parametrize("stage, preset", [("distill", "hovle_hd"), ("instruct", "hovle")])
def test_a_step_on_a_slice(stage, preset):
    report = compiled(stage, preset)
    assert (report.devices, report.parts, report.mesh["fsdp"]) == (16, 2, 16)
    memory = report.memory
    assert memory.fits and 0 < memory.arguments < memory.peak < memory.available == 16 * 2**30
    assert report.attention["embedding"].implementation == "splash" and report.attention["embedding"].kernels == 3
    if stage == "distill":
        assert "64" in report.attention["teacher"].reason and set(report.attention) == {"embedding", "teacher"}
    else:
        assert report.attention["llm"].kernels == 3
    assert report.bounds.bottleneck in ("compute", "memory", "ici") and 0 < report.bounds.mfu < 1
    assert {"all-gather", "reduce-scatter"} <= set(report.collectives)
    assert all(total.unknown == 0 for total in report.collectives.values())
    text = text_of(report)
    assert f"{stage}:{preset} train on v5e-16: 16 devices, mesh fsdp=16" in text and "MFU" in text
    json.dumps(report.to_dict())


@libtpu
def test_gradients_cross_slices_alone():
    report = compiled(rows=64, place=("v5e-16", 2))
    assert report.mesh == {"data": 2, "fsdp": 16, "tensor": 1, "sequence": 1}
    beyond = {kind for kind, total in report.collectives.items() if total.dcn_bytes}
    assert beyond == {"all-reduce"} and report.bounds.dcn > 0
    # What goes between slices are the parts of the gradients that each device has, not whole ones.
    assert sum(t.dcn_bytes for t in report.collectives.values()) < 1.5 * report.least.data + 1e6


@libtpu
def test_other_axes_keep_splash_attention():
    assert compiled(mesh=(("tensor", 2), ("sequence", 2))).attention["llm"].kernels == 3


@libtpu
def test_inputs_of_layers_can_wait_in_the_hosts_memory():
    report = compiled(execution=(("remat", "offload"),))
    assert report.memory.host > 0 == compiled("instruct", "hovle").memory.host and "in the host's memory" in text_of(
        report
    )


@libtpu
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_inference(program):
    report = compile_for(small("instruct"), Target.of("v5e-4"), program, new_tokens=64)
    assert report.program == program and report.bounds is None and report.memory.fits
    assert f"instruct:hovle {program} on v5e-4" in text_of(report)
    with pytest.raises(UserError, match="distill gives no model that answers"):
        compile_for(small("distill"), Target.of("v5e-4"), program)


@libtpu
def test_a_step_that_does_not_fit_names_its_size_and_remedies():
    config = small("instruct", rows=16 * 1024, length=2048, execution={"remat": "none", "accumulate": 1})
    with pytest.raises(TooLarge, match=r"needs [\d.]+ GB of 16\.\d GB a device. Cheapest remedies: ") as error:
        compile_for(config, Target.of("v5e-16"))
    remedies = str(error.value).split("Cheapest remedies: ")[1].split("; ")
    assert len(remedies) == 3 and error.value.needed > error.value.available
    assert any("--config.execution.accumulate=-1" in remedy for remedy in remedies)


@libtpu
def test_a_plan_recommends_the_fastest_that_fits():
    said = []
    made = plan.make(small("instruct"), Target.of("v5e-16"), said.append)
    seconds = [choice.estimate.bounds.seconds for choice in made.choices]
    assert seconds == sorted(seconds) and made.best.outcome == "fits" and len(said) >= 1
    assert made.best is next(choice for choice in made.choices if choice.report)
    assert f"recommended: {made.best.flags}" in plan.text_of(made)
    json.dumps(made.to_dict())


@libtpu
def test_neighbours_on_the_torus_are_neighbours_on_the_mesh():
    devices = topology.devices("v5e-256")
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    assert torus(make_mesh(MeshConfig(data=1, fsdp=-1), shuffled)) == (16, 16)
    assert torus(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=4), shuffled)) == (16, 4)
    two = make_mesh(MeshConfig(data=1, fsdp=-1), topology.devices("v5e-16", 2))
    assert two.shape["data"] == 2 and [{d.slice_index for d in part.flat} for part in two.devices] == [{0}, {1}]
    assert torus(two) == (4, 4)
    with pytest.raises(UserError, match="fsdp=5, .* does not cover 16 devices of each of 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=5), topology.devices("v5e-16", 2))


@libtpu
@pytest.mark.parametrize("kib", [32, 512])
@pytest.mark.parametrize("name", ["v5e-256", "v5p-128", "v6e-256", "v4-32"])
def test_a_product_gathers_twice_and_scatters_once_on_every_torus(name, kib):
    """A shard of so many KiB; an all-reduce in place of any of the three would move twice its bytes."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology.devices(name))
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
    assert least <= sent <= 17 / 16 * least  # where a product goes in windows, one part is sent once more
    if options and kib == 512:  # the options hand all of them to another core
        calls = sum(text.count('async_execution_thread="sparsecore"') for text in texts)
        assert calls >= 3


@libtpu
def test_what_a_step_is_compiled_with_where_its_collectives_would_stop_the_matmuls():
    def run(name, **execution):
        config = small("instruct", execution=execution)
        return setup.build(config, make_mesh(config.mesh, topology.devices(name)))

    v5e, v6e = run("v5e-16"), run("v6e-16")
    assert len(v6e.compiler_options()) == 3 and not v5e.compiler_options()
    assert train_step_for(v5e) is train_step and train_step_for(v6e) is not train_step
    assert not run("v6e-16", sparse_cores=False).compiler_options()


def command(*arguments, **environment):
    """Runs the command -> (status, stdout, stderr)."""
    call = [sys.executable, "-m", "hovle_jax.aot", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
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
    assert status == 0 and json.loads(out)["program"] == "decode", err
    lines = [line for line in err.splitlines() if line.startswith("compiling instruct:tiny decode for v5e-4")]
    assert lines[0].endswith("...") and ": done in 0:0" in lines[-1]


@libtpu
@pytest.mark.slow
def test_the_papers_step_on_a_pod_fits_and_is_bound_by_its_products():
    status, out, err = command(
        "--config=configs/instruct.py:hovle", "--topology=v5e-256", "--json", "--config.data.sequence_length=4096"
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["memory"]["fits"] and (report["rows"], report["parts"]) == (4096, 16)
    assert all(used["kernels"] == 3 for used in report["attention"].values())
    assert report["excess"] <= 1.15
    assert report["bounds"]["mfu"] >= 0.6 and report["bounds"]["bottleneck"] == "compute"
