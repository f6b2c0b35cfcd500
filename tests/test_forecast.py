"""How long a program for TPUs takes: schedules written by hand, and small ones by libtpu."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hovle_jax.aot
from hovle_jax.aot import kernels
from hovle_jax.aot.forecasting import of_text
from hovle_jax.aot.hlo import work
from hovle_jax.aot.hlo.collectives import PALLAS
from hovle_jax.aot.hlo.text import Instruction
from hovle_jax.aot.machine import Machine
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import Topology
from tests.benchmarks import forecast_calibration

libtpu = pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed (the extra 'tpu')")
MICRO = 1e-6
MATMUL = """
%product (a: bf16[65536,65536], b: bf16[65536,65536]) -> bf16[65536,65536] {
  %a = bf16[65536,65536]{1,0} parameter(0)
  %b = bf16[65536,65536]{1,0} parameter(1)
  ROOT %c = bf16[65536,65536]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
"""
MOVE = """
%moved (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{0,1} transpose(%a), dimensions={1,0}
}
"""
SUM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
GROUPS = "replica_groups={{0,1,2,3}}, to_apply=%add"


def machine(generation="v5e", shape=(2, 2)):
    return Machine(Topology(generation, shape), np.indices(shape).reshape(len(shape), -1).T)


def cycles(micro, clock=1500):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{round(micro * clock)}"}}}}'


def matmul(name, micro, operand="x", path="jit(f)/Model/dot", clock=1500):
    called = f'kind=kOutput, calls=%product, metadata={{op_name="{path}"}}, {cycles(micro, clock)}'
    return f"  %{name} = bf16[8,8]{{1,0}} fusion(%{operand}, %{operand}), {called}"


def program(*lines, before="", devices=4):
    header = f"HloModule jit_step, is_scheduled=true, num_partitions={devices}\n"
    first = ["  %x = bf16[8,8]{1,0} parameter(0)", "  %long = f32[1048576]{0} parameter(1)"]
    body = "\n".join([*first, *lines])
    return f"{header}{MATMUL}{MOVE}{SUM}{before}\nENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{\n{body}\n}}\n"


def of(*lines, on=None, schedule=lambda call: None, **options):
    return of_text(program(*lines, **options), on or machine(), schedule)


def close(value):
    return pytest.approx(value, rel=1e-6)


# Cycles


def test_a_product_takes_its_cycles_and_what_streams_a_range():
    stream = f"  %s = f32[1048576]{{0}} add(%long, %long), {cycles(24.6)}"
    move = f"  %m = bf16[8,8]{{0,1}} fusion(%x), kind=kLoop, calls=%moved, {cycles(2.46)}"
    found = of(matmul("a", 3), stream, move)
    assert found.kinds == {
        "elementwise": close((10e-6, 24.6e-6)),
        "matmul": close((3e-6, 3e-6)),
        "layout": close((1e-6, 2.46e-6)),
    }
    assert (found.low, found.high, found.unknown) == (close(14e-6), close(30.06e-6), {})
    assert found.middle == (found.low + found.high) / 2


@pytest.mark.parametrize("micro, low", [(11, 10.9), (20, 10.9), (200, 200 / 2.46)])
def test_a_product_takes_at_least_its_flops_at_the_peak_and_what_is_fused_to_it_streams(micro, low):
    small = MATMUL.replace("65536", "1024").replace("%product", "%small")
    line = matmul("a", micro).replace("%product", "%small")
    assert of(line, before=small).kinds["matmul"] == pytest.approx((low * MICRO, micro * MICRO), rel=0.001)


@pytest.mark.parametrize(
    "generation, flops", [("v4", 262144), ("v5e", 131072), ("v5p", 262144), ("v6e", 524288), ("tpu7x", 524288)]
)
def test_clocks_are_the_peaks_over_what_is_multiplied_in_a_cycle(generation, flops):
    on = machine(generation, (2, 2, 1) if topology.GENERATIONS[generation].dimensions == 3 else (2, 2))
    assert on.clock * flops * on.topology.kind.devices_per_chip == pytest.approx(on.chip.bf16_flops, rel=0.005)


LOOP = """
%body (p: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[8,8]{1,0} get-tuple-element(%p), index=1
LINE
  ROOT %t = (s32[], bf16[8,8]) tuple(%next, %y)
}

%condition (p: (s32[], bf16[8,8])) -> pred[] {
  %p = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %more = pred[] compare(%i, %n), direction=LT
}
"""
RUN = ("  %zero = s32[] constant(0)", "  %begin = (s32[], bf16[8,8]) tuple(%zero, %x)")
WHILE = "  %w = (s32[], bf16[8,8]) while(%begin), condition=%condition, body=%body"


def test_a_loop_takes_its_body_as_often_as_it_runs():
    found = of(*RUN, WHILE, before=LOOP.replace("LINE", matmul("y", 2)))
    assert found.kinds["matmul"] == close((14e-6, 14e-6)) and not found.unknown
    unknown = LOOP.replace("LINE", matmul("y", 2)).replace("%n = s32[] constant(7)", "%n = s32[] after-all()")
    found = of(*RUN, WHILE, before=unknown)
    assert found.kinds["matmul"] == close((2e-6, 2e-6))
    assert found.unknown == {"w: a loop of unknown length, counted once": None}


def test_of_two_branches_the_longer_one_counts():
    def branch(name, micro):
        line = matmul("y", micro).replace("  %y", "  ROOT %y")
        return f"\n%{name} (x: bf16[8,8]) -> bf16[8,8] {{\n  %x = bf16[8,8]{{1,0}} parameter(0)\n{line}\n}}\n"

    line = "  %c = bf16[8,8]{1,0} conditional(%p, %x, %x), true_computation=%short, false_computation=%longer"
    found = of("  %p = pred[] constant(true)", line, before=branch("short", 1) + branch("longer", 5))
    assert found.high == close(5e-6)


@pytest.mark.parametrize("place, moved", [("", 8 * 2**20), ("S(1)", 4 * 2**20)])
def test_what_has_no_estimate_counts_its_bytes_and_is_listed(place, moved):
    """Arrays in another memory than the large one move nothing there; 2^63 - 1 is no estimate."""
    none = 'backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}'
    found = of(matmul("a", 3), f"  %gathered.12 = f32[1048576]{{0:T(1024){place}}} negate(%long), {none}")
    seconds = moved / 819e9
    assert found.high == found.low == close(3e-6 + seconds)
    assert found.unknown == {"gathered": close(seconds / found.high)}
    assert not of(matmul("a", 30000), f"  %gathered.12 = f32[1048576]{{0}} negate(%long), {none}").unknown  # too small


def test_an_update_in_place_moves_what_it_writes():
    lines = ("  %n = s32[] constant(0)", "  %part = f32[1024]{0} slice(%long), slice={[0:1024]}")
    update = "  %u = f32[1048576]{0} dynamic-update-slice(%long, %part, %n)"
    assert of(matmul("a", 1), *lines, update).high == close(1e-6 + 2 * (2 * 4096 / 819e9))


def test_parts_are_modules_and_what_has_no_path_belongs_to_its_neighbour():
    paths = {
        "jit(f)/while/body/jvp(Tower.run)/dot": "Tower",
        "jit(f)/transpose(jvp(Model))/Model.encode/dot": "Model",
        "jit(f)/jvp()/shard_map/dot": work.LOSS,
        "jit(f)/while/body/Teacher/layers/dot": "Teacher",
        "jit(f)/mul": work.REST,
        "add": "",
    }
    at = lambda path: Instruction("a", "", "", "", f'metadata={{op_name="{path}"}}')
    assert {path: work.part_of(at(path)) for path in paths} == paths
    places = {"a": "jit(f)/jvp(Tower)/dot", "b": "", "c": "jit(f)/mul"}
    lines = [matmul(name, micro, path=places[name]) for name, micro in (("a", 1), ("b", 2), ("c", 4))]
    found = of_text(program(*lines), machine(), lambda call: None, {"Tower": "vision"})
    assert found.parts == {"rest": close((4e-6, 4e-6)), "vision": close((3e-6, 3e-6))}


# The network: v5e's 2x2 is two lines, so that two of four links of 50 GB/s are busy, and the farthest chip 2 hops away


REDUCED = 2 * 3 / 4 * 4 * 2**20 / 100e9 + 2 * MICRO


def test_a_collective_that_stops_the_program_is_exposed():
    found = of(matmul("a", 3), f"  %r = f32[1048576]{{0}} all-reduce(%long), {GROUPS}")
    assert found.kinds["network"] == close((REDUCED, REDUCED)) and found.high == close(3e-6 + REDUCED)


def test_links_are_those_of_the_axes_along_which_the_devices_lie():
    pair = "replica_groups={{0,1},{2,3}}, to_apply=%add"
    found = of(matmul("a", 1), f"  %r = f32[1048576]{{0}} all-reduce(%long), {pair}")
    assert found.kinds["network"][0] == close(4 * 2**20 / 50e9 + MICRO)
    ring = machine(shape=(16, 16))
    column = "replica_groups={{" + ",".join(str(16 * n) for n in range(16)) + "}}, to_apply=%add"
    found = of(matmul("a", 1), f"  %r = f32[1048576]{{0}} all-reduce(%long), {column}", on=ring, devices=256)
    assert found.kinds["network"][0] == close(2 * 15 / 16 * 4 * 2**20 / 100e9 + 8 * MICRO)


@pytest.mark.parametrize("micro, exposed", [(200, 0), (20, REDUCED - 20e-6)])
def test_what_starts_and_ends_hides_behind_what_lies_between(micro, exposed):
    start = f"  %s = f32[1048576]{{0}} all-reduce-start(%long), {GROUPS}"
    found = of(start, matmul("a", micro), "  %d = f32[1048576]{0} all-reduce-done(%s)")
    assert found.kinds.get("network", (0, 0)) == close((exposed, exposed))
    assert found.high == close(micro * MICRO + exposed)


def test_two_that_go_on_at_once_share_the_links():
    starts = [f"  %s{n} = f32[1048576]{{0}} all-reduce-start(%long), {GROUPS}" for n in (1, 2)]
    dones = [f"  %d{n} = f32[1048576]{{0}} all-reduce-done(%s{n})" for n in (1, 2)]
    assert of(*starts, matmul("a", 30), *dones).high == close(2 * REDUCED)


CHAIN = """
%NAME (a: bf16[524288]) -> bf16[2097152] {
  %a = bf16[524288]{0} parameter(0)
  ROOT %g = bf16[2097152]{0} all-gather(%a), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="5"}
}
"""


@pytest.mark.parametrize("micro, exposed", [(200, 0), (20, 3 * 2**20 / 100e9 + 2 * MICRO - 20e-6)])
def test_a_gather_in_several_fusions_goes_on_from_the_first_to_the_last(micro, exposed):
    given = "  %y = bf16[524288]{0} parameter(2)"
    fusion = lambda name: f"  %{name} = bf16[2097152]{{0}} fusion(%y), kind=kCustom, calls=%{name}.called"
    before = "".join(
        CHAIN.replace("NAME", f"{name}.called") for name in ("async-collective-start", "async-collective-done")
    )
    found = of(
        given, fusion("async-collective-start"), matmul("a", micro), fusion("async-collective-done"), before=before
    )
    assert found.high == close(micro * MICRO + exposed) and not found.unknown


SPARSE = """
%gathering (a: bf16[524288]) -> bf16[2097152] {
  %a = bf16[524288]{0} parameter(0)
  ROOT %g = bf16[2097152]{0} all-gather(%a), replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"

%picking (a: f32[1048576]) -> f32[1048576] {
  %a = f32[1048576]{0} parameter(0)
  ROOT %g = f32[1048576]{0} negate(%a)
}, execution_thread="sparsecore"
"""


def test_what_a_sparse_core_does_goes_on_beside():
    gather = [
        "  %y = bf16[524288]{0} parameter(2)",
        '  %s = ((), ()) call-start(%y), async_execution_thread="sparsecore", to_apply=%gathering',
        matmul("a", 10),
        "  %u = ((), ()) call-update(%s)",
        matmul("b", 10),
        "  %d = bf16[2097152]{0} call-done(%u)",
    ]
    found = of(*gather, before=SPARSE)
    assert found.high == close(3 * 2**20 / 100e9 + 2 * MICRO) and not found.unknown
    pick = '  %p = ((), ()) call-start(%long), async_execution_thread="sparsecore", to_apply=%picking'
    found = of(pick, matmul("a", 1), "  %e = f32[1048576]{0} call-done(%p)", before=SPARSE)
    assert set(found.unknown) == {"p"} and found.high == close(4 * 2**20 / 819e9)


def test_between_slices_the_network_of_the_data_centre_counts():
    places = np.concatenate([machine().places] * 2)
    two = Machine(Topology("v5e", (2, 2), slices=2), places)
    across = "replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add"
    found = of(matmul("a", 1), f"  %r = f32[1048576]{{0}} all-reduce(%long), {across}", on=two, devices=8)
    assert found.kinds["network"][0] == close(4 * 2**20 / 3.125e9)


# Kernels

BUNDLES = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 1 } /* entry bundle: %call.1 = custom-call(%q) */
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %p1 = scmp.eq.s32.totalorder %s2, 0 }
   0x3 PF: > { %v1 = vadd.f32 %v0, %v0 }
   0x4   : > { %v2 = vadd.f32 %v1, %v0 }
   0x5   : > { %v3 = vadd.f32 %v2, %v0 }
   0x6 LB: > > { %v4 = vadd.f32 %v3, %v0 }
   0x7   :  { %5 = sfence }
"""


def test_bundles_between_branches_of_a_kernel():
    in_a_grid = BUNDLES.replace("%q)", "%q) iteration_bounds: (2, 4)")
    assert kernels.read(in_a_grid) == kernels.Schedule(bundles=8, longest=3, loops=1, steps=8)
    assert kernels.read(BUNDLES) == kernels.Schedule(8, 3, 2, 1)


KERNEL = f"""  %mask.block_mask_ref = s8[1,2,2]{{2,1,0}} constant({{ {{ {{ 1, 0 }}, {{ 2, 1 }} }} }})
  %splash_k.1 = (bf16[8,8]{{1,0}}, f32[8]{{0}}) custom-call(%x, MASK), custom_call_target="{PALLAS}", \
backend_config={{"custom_call_config":{{"body":"abc=","debug_locations":"here"}}}}"""


def test_a_kernel_takes_the_steps_that_its_mask_leaves():
    calls = []

    def schedule(call):
        calls.append(call)
        return kernels.Schedule(bundles=2000, longest=1500, loops=0, steps=8)

    found = of(KERNEL.replace("MASK", "%mask.block_mask_ref"), schedule=schedule)
    assert found.kinds["kernels"] == close((6e-6, 8e-6)) and not found.unknown
    assert calls == [
        {
            "operands": [["bfloat16", [8, 8]], ["int8", [1, 2, 2]]],
            "results": [["bfloat16", [8, 8]], ["float32", [8]]],
            "config": {"body": "abc="},
        }
    ]


def test_a_mask_that_a_loop_copies_each_time_is_known():
    """As where the copy for the next layer is made during this one."""
    body = LOOP.replace("bf16[8,8])", "bf16[8,8], s8[1,2,2], s8[1,2,2])").replace(
        "%next, %y)", "%next, %y, %kept, %fresh)"
    )
    lines = [
        "  %kept = s8[1,2,2]{2,1,0} get-tuple-element(%p), index=2",
        "  %near = s8[1,2,2]{2,1,0} get-tuple-element(%p), index=3",
        "  %fresh = s8[1,2,2]{2,1,0} copy(%kept)",
        KERNEL.splitlines()[-1].replace("MASK", "%near"),
        "  %y = bf16[8,8]{1,0} get-tuple-element(%splash_k.1), index=0",
    ]
    start = [
        KERNEL.splitlines()[0],
        "  %zero = s32[] constant(0)",
        "  %copied = s8[1,2,2]{2,1,0} copy(%mask.block_mask_ref)",
    ]
    begin = "  %begin = (s32[], bf16[8,8], s8[1,2,2], s8[1,2,2]) tuple(%zero, %x, %mask.block_mask_ref, %copied)"
    schedule = lambda call: kernels.Schedule(bundles=1500, longest=1500, loops=0, steps=8)
    found = of(*start, begin, WHILE, before=body.replace("LINE", "\n".join(lines)), schedule=schedule)
    assert found.kinds["kernels"] == close((7 * 6e-6, 7 * 6e-6)) and not found.unknown


def test_what_is_not_known_of_a_kernel_is_listed():
    part = "  %part = s8[1,1,2]{2,1,0} dynamic-slice(%mask.block_mask_ref, %zero, %zero), dynamic_slice_sizes={1,1,2}"
    sharded = KERNEL.replace("MASK", "%part").replace("\n", f"\n  %zero = s32[] constant(0)\n{part}\n")
    found = of(sharded, schedule=lambda call: kernels.Schedule(1500, 1500, 0, 8))
    assert found.high == close(6e-6) and not found.unknown
    elided = KERNEL.replace("MASK", "%mask.block_mask_ref").replace("{ { { 1, 0 }, { 2, 1 } } }", "{...}")
    found = of(elided, schedule=lambda call: kernels.Schedule(2000, 1500, 1, 8))
    assert found.high == close(2000 * 8 / 1.5e9)
    assert set(found.unknown) == {"splash_k: its mask, taken as full", "splash_k: loops in a step, counted once"}
    found = of(matmul("a", 1), KERNEL.replace("MASK", "%long"))
    assert found.unknown == {"splash_k": close(1 - 1e-6 / found.high)} and found.high > 5e-6


# Programs of libtpu


@libtpu
def test_a_product_compiled_for_a_tpu_runs_near_its_peak():
    mesh = Mesh(np.asarray(topology.find("v5e-4").devices()).reshape(4), ("x",))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    a, b = (jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=place(axis)) for axis in ("x", None))

    def five(a, b):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, None, length=5)[0].sum()

    found = hovle_jax.aot.forecast(jax.jit(five).lower(a, b).compile())
    ideal = 5 * 2 * 4096**3 / 4 / 197e12
    assert 0.999 * ideal < found.kinds["matmul"][0] < 1.4 * ideal and found.low <= found.high < 1.7 * ideal
    assert 0 < found.kinds["network"][0] < 0.1 * found.low and set(found.parts) == {"rest"}
    json.dumps(dataclasses.asdict(found))


def test_a_program_for_another_machine_is_refused():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()
    with pytest.raises(UserError, match="a forecast reads programs for v4, v5e, .*; this one is for 'cpu'"):
        hovle_jax.aot.forecast(compiled)
    with pytest.raises(UserError, match="no estimates of libtpu"):
        of("  %n = bf16[8,8]{1,0} negate(%x)")


@libtpu
@pytest.mark.parametrize(
    "name", ["v5e-4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v4-8", "v5p-8", "v6e-4"))]
)
def test_what_streams_is_overestimated_as_the_table_says(name):
    """The low end is then the bytes at the published bandwidth."""
    target = topology.find(name)
    place = jax.sharding.SingleDeviceSharding(target.devices()[0])
    compiled = (
        jax.jit(lambda x: x * 2).lower(jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16, sharding=place)).compile()
    )
    found = hovle_jax.aot.forecast(compiled)
    assert found.low == pytest.approx(2 * 2**27 / chip_of(target.generation).hbm_bandwidth, rel=0.01)


@libtpu
def test_the_example_of_the_docs_runs(capsys):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "forecast.md").read_text()
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    ideal = 2 * 4096**3 / 16 / 197e12
    assert 0.999 * ideal < names["found"].kinds["matmul"][0] < 1.5 * ideal and "matmul" in capsys.readouterr().out


def test_published_flops_become_seconds_as_where_both_are_published():
    case = forecast_calibration.CASES["Llama-3.1-8B"]
    seconds = forecast_calibration.maxtext_seconds(case.stack, case.vocab, case.rows, case.length, 413.433)
    assert seconds == pytest.approx(case.measured, rel=1e-3)
