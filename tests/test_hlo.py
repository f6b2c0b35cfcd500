"""Collectives read from compiled programs: texts written by hand, programs for 8 CPU devices, one for a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hovle_jax.aot.hlo.collectives import KINDS, collectives, kernels, summary
from hovle_jax.aot.hlo.replica_groups import replica_groups
from hovle_jax.aot.hlo.text import arrays, parse
from hovle_jax.hardware import topology

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n"
SUM = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def entry(*lines, before=""):
    return f"{HEADER}{before}{SUM}\nENTRY %main (x: f32[16,4]) -> f32[] {{\n" + "\n".join(lines) + "\n}\n"


def one(*lines, before="", **options):
    """The only collective of a program."""
    (found,) = collectives(entry("  %x = f32[16,4]{1,0} parameter(0)", *lines, before=before), **options)
    return found


# Shapes and groups


@pytest.mark.parametrize(
    "text, found",
    [
        ("f32[16,4]{1,0}", [("f32", 256)]),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [("bf16", 2048)]),
        ("(bf16[2,3]{1,0}, /*index=1*/s32[], token[])", [("bf16", 12), ("s32", 4)]),
        ("s4[10]{0:E(4)}", [("s4", 5)]),
        ("pred[<=3]", [("pred", 3)]),
        ("(f8e4m3b11fnuz[4], f4e2m1fn[4], c128[])", [("f8e4m3b11fnuz", 4), ("f4e2m1fn", 2), ("c128", 16)]),
    ],
)
def test_arrays_of_a_shape(text, found):
    assert arrays(text) == found


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}, x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0},{2,2}}, x", [[0, 1], [0, 1], [2]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, x", [[0, 3], [1, 2]]),
    ],
)
def test_groups_in_every_notation(attributes, groups):
    found = [sorted(int(n) for n in group) for group in replica_groups(attributes, 8)]
    assert sorted(found) == groups


# Written by hand


@pytest.mark.parametrize(
    "line, kind, operand, size, sent",
    [
        ("all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 256, 4, 768),
        ("reduce-scatter(%x), replica_groups=[1,8]<=[8], to_apply=%add", "reduce-scatter", 256, 8, 224),
        ("all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", "all-reduce", 256, 4, 384),
        ("all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 256, 8, 448),
        ("all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}", "all-to-all", 256, 2, 128),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 256, 2, 256),
        ("all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 256, 4, 768),
    ],
)
def test_a_collective_of_each_kind(line, kind, operand, size, sent):
    found = one(f"  ROOT %y = f32[16,4]{{1,0}} {line}, channel_id=1")
    assert (found.kind, found.operand_bytes, found.group_size, found.wire_bytes) == (kind, operand, size, sent)
    assert (found.dtype, found.times) == ("f32", 1)


def test_what_a_group_of_one_sends_is_nothing():
    assert [share(1) for share in KINDS.values()] == [0] * len(KINDS)


def test_groups_that_leave_a_slice():
    line = "  ROOT %y = f32[16,4]{{1,0}} all-reduce(%x), replica_groups={}, to_apply=%add"
    assert not one(line.format("{{0,1,2,3},{4,5,6,7}}"), devices_per_slice=4).crosses_slices
    assert one(line.format("{{0,4},{1,5},{2,6},{3,7}}"), devices_per_slice=4).crosses_slices


def test_sends_to_other_slices_are_collectives_over_the_network():
    found = one(
        "  %token = token[] after-all()",
        "  ROOT %s = (f32[16,4]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    assert (found.kind, found.group_size, found.crosses_slices, found.wire_bytes) == ("all-reduce", 2, True, 256)
    assert summary([found])["all-reduce"].dcn_bytes == 256


def test_an_all_gather_cloned_into_fusions_is_one():
    clone = """
%fused.{0} (p: f32[16,4]) -> f32[64,4] {{
  %p = f32[16,4]{{1,0}} parameter(0)
  ROOT %g.{0} = f32[64,4]{{1,0}} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={{0}}, \
frontend_attributes={{chain_id="{1}"}}
}}
"""
    call = "  %f.{0} = f32[64,4]{{1,0}} fusion(%x), kind=kCustom, calls=%fused.{0}"
    before = "".join(clone.format(i, chain) for i, chain in enumerate((0, 0, 0)))
    found = one(*(call.format(i) for i in range(3)), before=before)
    assert found.name == "g.0" and found.beside
    # Another chain on the same channel, as an unrolled loop has them, is another one.
    before = "".join(clone.format(i, chain) for i, chain in enumerate((0, 0, 1)))
    text = entry("  %x = f32[16,4]{1,0} parameter(0)", *(call.format(i) for i in range(3)), before=before)
    assert [c.name for c in collectives(text)] == ["g.0", "g.2"]


SCATTER = """\
  {root}%s{i} = f32[{left},4]{{1,0}} reduce-scatter({operand}), channel_id=1, replica_groups={groups}, \
dimensions={{0}}, to_apply=%add, metadata={{op_name="shard_map/reduce_scatter"}}"""
FUSED = """
%fused.{i} (p: f32[{rows},4]) -> f32[{left},4] {{
  %p = f32[{rows},4]{{1,0}} parameter(0)
{scatter}
}}
"""


@pytest.mark.parametrize("fused", [False, True])
def test_reduce_scatters_on_one_channel_are_not_clones(fused):
    """`psum_scatter` of two kernels, each along both dimensions of a torus: all four have channel 1 and one op_name."""
    phases = [(16, 4, "{{0,1,2,3},{4,5,6,7}}"), (4, 2, "{{0,4},{1,5},{2,6},{3,7}}")]
    lines, before = ["  %x = f32[16,4]{1,0} parameter(0)"], ""
    for i, (rows, left, groups) in enumerate(phases * 2):
        operand = f"%s{i - 1}" if i % 2 else "%x"
        fields = dict(i=i, rows=rows, left=left, groups=groups)
        before += FUSED.format(scatter=SCATTER.format(operand="%p", root="ROOT ", **fields), **fields)
        call = f"  %s{i} = f32[{left},4]{{1,0}} fusion({operand}), kind=kCustom, calls=%fused.{i}"
        lines.append(call if fused else SCATTER.format(operand=operand, root="", **fields))
    found = collectives(entry(*lines, before=before * fused))
    assert [(c.kind, c.operand_bytes, c.group_size) for c in found] == [
        ("reduce-scatter", 256, 4),
        ("reduce-scatter", 64, 2),
    ] * 2


def test_an_all_reduce_scatter_fusion_is_a_reduce_scatter():
    before = """
%all-reduce-scatter.1 (p: f32[16,4]) -> f32[4,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %r = f32[16,4]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = f32[4,4]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,4}
}
"""
    found = one("  ROOT %f = f32[4,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", before=before)
    assert (found.kind, found.wire_bytes) == ("reduce-scatter", 192)


def test_wrapped_asynchronous_collectives_and_both_branches_count():
    before = """
%wrapped (p: f32[16,4]) -> f32[2,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %s = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%branch (q: f32[16,4]) -> f32[16,4] {
  %q = f32[16,4]{1,0} parameter(0)
  ROOT %r = f32[16,4]{1,0} all-reduce(%q), replica_groups=[1,8]<=[8], to_apply=%add
}
"""
    text = entry(
        "  %x = f32[16,4]{1,0} parameter(0)",
        "  %i = s32[] constant(0)",
        "  %a = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-start(%x), calls=%wrapped",
        "  %d = f32[2,4]{1,0} async-done(%a), calls=%wrapped",
        "  ROOT %c = f32[16,4]{1,0} conditional(%i, %x, %x), branch_computations={%branch, %branch}",
        before=before,
    )
    assert [c.kind for c in collectives(text)] == ["reduce-scatter", "all-reduce", "all-reduce"]


LOOP = """
%condition (t: (s32[], f32[16,4], s32[])) -> pred[] {{
  %t = (s32[], f32[16,4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] {limit}
  ROOT %c = pred[] compare(%i, %limit), direction={direction}
}}

%body (u: (s32[], f32[16,4], s32[])) -> (s32[], f32[16,4], s32[]) {{
  %u = (s32[], f32[16,4], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %n = s32[] get-tuple-element(%u), index=2
  %by = s32[] {step}
  %next = s32[] add(%j, %by)
  %v = f32[16,4]{{1,0}} get-tuple-element(%u), index=1
  %r = f32[16,4]{{1,0}} all-reduce(%v), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[16,4], s32[]) tuple(%next, %r, %n)
}}
"""


def times(limit="constant(8)", step="constant(1)", direction="LT", attributes=""):
    """How often the collective in the loop runs; it starts at 2, and element 2 of its tuple is 20."""
    return one(
        "  %first = s32[] constant(2)",
        "  %twenty = s32[] constant(20)",
        "  %start = (s32[], f32[16,4], s32[]) tuple(%first, %x, %twenty)",
        f"  ROOT %w = (s32[], f32[16,4], s32[]) while(%start), condition=%condition, body=%body{attributes}",
        before=LOOP.format(limit=limit, step=step, direction=direction),
    ).times


def test_trip_counts():
    carried = "get-tuple-element(%t), index=2"
    assert times() == 6
    assert times(direction="LE") == 7
    assert times(step="constant(4)") == 2
    assert times(limit=carried) == 18
    assert times(limit="constant(-2)", step="constant(-2)", direction="GT") == 2
    assert times(limit="constant(2)") == 0
    assert times(direction="NE") == 6
    assert times(attributes=', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}') == 5


def test_a_trip_count_that_cannot_be_told_is_none_and_is_reported():
    assert times(step="custom-call(%j)") is None
    assert times(limit="custom-call(%i)") is None
    total = summary([unbounded()])["all-reduce"]
    assert (total.unknown, total.count, total.bytes) == (1, 1, 448)


def unbounded():
    """A collective in a loop that starts anywhere."""
    return one(
        "  %first = s32[] custom-call(%x)",
        "  %start = (s32[], f32[16,4], s32[]) tuple(%first, %x, %first)",
        "  ROOT %w = (s32[], f32[16,4], s32[]) while(%start), condition=%condition, body=%body",
        before=LOOP.format(limit="constant(8)", step="constant(1)", direction="LT"),
    )


def test_kernels_by_name_with_line_breaks_in_their_metadata():
    found = kernels(
        entry(
            "  %x = f32[16,4]{1,0} parameter(0)",
            '  ROOT %splash_mha_fwd.3 = f32[16,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
            "frontend_attributes={kernel_metadata={",
            '"xprof_metadata":"{}"',
            '}}, metadata={op_name="jit(step)/llm/splash_mha_fwd/pallas_call" stack_frame_id=17}',
        )
    )
    assert found == ["jit(step)/llm/splash_mha_fwd/pallas_call"]


@pytest.mark.parametrize("opcode, called", [("call-start", "to_apply"), ("async-start", "calls")])
def test_a_collective_on_another_core(opcode, called):
    before = """
%offloaded (p: f32[16,4]) -> f32[16,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %ar = f32[16,4]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"
"""
    start = f'((f32[16,4]), f32[16,4], s32[]) {opcode}(%x), async_execution_thread="sparsecore", {called}=%offloaded'
    found = one(f"  %start = {start}", "  ROOT %done = f32[16,4]{1,0} call-done(%start)", before=before)
    assert (found.kind, found.operand_bytes, found.group_size, found.times) == ("all-reduce", 256, 8, 1)
    assert found.beside and summary([found])["all-reduce"].beside == found.bytes


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule x\n")


# Compiled programs

LAYERS, WIDTH, HIDDEN, MICROBATCHES = 3, 64, 256, 2


def fsdp_step(devices, width, hidden, rows, microbatches=1, length=8):
    """The text of a gradient step: a scanned and rematerialised MLP, its kernels cut over all devices."""
    mesh = Mesh(np.asarray(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, P(None, "fsdp"))
    kernels = [
        jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32, sharding=cut)
        for shape in ((width, hidden), (hidden, width))
    ]
    spec = P("fsdp") if microbatches == 1 else P(None, "fsdp")
    shape = (rows, length, width) if microbatches == 1 else (microbatches, rows, length, width)
    batch = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    @jax.checkpoint
    def layer(x, kernels):
        up, down = (k.astype(jnp.bfloat16) for k in kernels)
        flat = x.reshape(-1, width)
        x = (flat + jax.nn.silu(flat @ up) @ down).reshape(x.shape)
        return jax.lax.with_sharding_constraint(x, P("fsdp")), None

    def loss(kernels, x):
        return jnp.mean(jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32) ** 2)

    def step(kernels, batch):
        if microbatches == 1:
            return jax.grad(loss)(kernels, batch)
        add = lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(kernels, x)), None)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, kernels), batch)[0]

    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=[cut, cut]).lower(kernels, batch).compile().as_text()


KERNELS = 2 * WIDTH * HIDDEN  # elements of a layer


@pytest.mark.parametrize("microbatches", [1, MICROBATCHES])
def test_an_fsdp_step_on_eight_devices(microbatches):
    """Both kernels are gathered in the forward pass and again for its recomputation, their gradients reduced once.

    The CPU backend computes bfloat16 collectives in float32 and knows no reduce-scatter.
    """
    found = collectives(fsdp_step(jax.devices()[:8], WIDTH, HIDDEN, rows=8, length=512, microbatches=microbatches))
    runs = LAYERS * microbatches
    assert {c.times for c in found} == {runs}
    total = summary(found)
    assert set(total) == {"all-gather", "all-reduce"}
    assert total["all-gather"].count == 4 * runs
    assert total["all-gather"].bytes == 2 * 7 / 8 * 4 * KERNELS * runs
    assert total["all-reduce"].bytes == 2 * 7 / 8 * 4 * KERNELS * runs


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_an_fsdp_step_on_sixteen_tpus():
    """Two gathers and one reduction in bfloat16, most of them as products in windows: loops of 16 or 17 permutations.

    Fifteen would do, and a program that did not multiply by the trip counts would have two or four.
    """
    width, hidden = 512, 2048
    found = collectives(fsdp_step(topology.find("v5e-16").devices(), width, hidden, rows=16, length=2048))
    assert {c.dtype for c in found} == {"bf16"} and all(c.times for c in found)
    total = summary(found)
    assert {"all-gather", "collective-permute"} >= set(total)
    least = 3 * 15 / 16 * 2 * LAYERS * 2 * width * hidden
    assert least <= sum(of.bytes for of in total.values()) <= least * 17 / 15
