"""TPU slices by name, published peaks, and the bounds that follow from them."""

import importlib.util

import pytest

from hovle_jax.aot.hlo.collectives import Collective
from hovle_jax.aot.report import step_of
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.hardware.chips import CHIPS, chip_of
from hovle_jax.training.flops import StepFlops

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


# Slices


@pytest.mark.parametrize(
    "name, libtpu, chips",
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-8", "v5e:2x4", 8),
        ("V5P-128", "v5p:4x4x4", 64),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v6e-64", "v6e:8x8", 64),
        ("v6e-1", "v6e:1x1", 1),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16),
        ("tpu7x-128", "tpu7x:4x4x4", 64),
        ("v5e:4x8", "v5e:4x8", 32),
        ("v5p:4x4x12", "v5p:4x4x12", 192),
    ],
)
def test_names_of_slices(name, libtpu, chips):
    found = topology.find(name)
    assert (found.libtpu_name, found.chips) == (libtpu, chips)
    assert topology.find(found.libtpu_name) == found
    assert topology.find(found.name).chips == chips


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5e-100", "v5e-64, v5e-128, v5e-256"),
        ("v5p-7", "v5p-8, v5p-16"),
        ("v5q-8", "v4, v5e, v5p, v6e, tpu7x"),
        ("a pod", "v5e:16x16"),
        ("v5e:3x3", "v5e-4, v5e-8, v5e-16"),
        ("v5e:4x4x4", "has 2 axes"),
        ("v6e:32x32", "at most 256 chips"),
        ("v5e:0x4", "does not exist"),
    ],
)
def test_slices_that_do_not_exist(name, said):
    with pytest.raises(UserError, match=said):
        topology.find(name)


def test_an_axis_is_a_ring_where_it_is_whole():
    busy = {"v5e-256": 1, "v5e-128": 3 / 4, "v5e-64": 1 / 2, "v5e-1": 0, "v5p-128": 1, "v5p-32": 1 / 2}
    assert {name: topology.find(name).ways(topology.find(name).shape)[0] for name in busy} == busy


def test_the_next_larger_slice():
    names = ("v5e-4", "v5e:16x16", "v5p-8", "v5p-64", "v5e:2x8")
    assert [next((more.name for more in topology.find(name).larger()), None) for name in names] == [
        "v5e-8", None, "v5p-16", "v5p-128", "v5e-32",
    ]  # fmt: skip
    assert topology.find("v5e-16", 2).larger()[0].name == "2 x v5e-32"


@needs_libtpu
def test_libtpu_has_these_devices():
    devices = {"v4-32": 16, "v5e-1": 1, "v5e-256": 256, "v5p-8": 4, "v5p-128": 64, "v6e-64": 64, "tpu7x-16": 16}
    assert {name: len(topology.find(name).devices()) for name in devices} == devices
    two = topology.find("v5e-16", slices=2).devices()
    assert [d.slice_index for d in two] == [0] * 16 + [1] * 16


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e-16 needs libtpu.*hovle_jax\[tpu\]"):
        topology.find("v5e-16").devices()


# Chips


@pytest.mark.parametrize(
    "kind, key",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v4", "v4"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("v5e", "v5e"),
    ],
)
def test_chips_by_what_jax_calls_them(kind, key):
    assert chip_of(kind) is CHIPS[key]


def test_an_unknown_chip():
    with pytest.raises(UserError, match="no published peaks are known of 'NVIDIA L4'"):
        chip_of("NVIDIA L4")


def test_every_generation_has_peaks_and_their_source():
    assert set(topology.GENERATIONS) <= set(CHIPS)
    for key, chip in CHIPS.items():
        assert chip.source.startswith("https://"), key


# Bounds


def step_on(name, **sent):
    """Of a step of a second of hardware FLOPs, three quarters of them the model's, and bytes that each device sends."""
    target = topology.find(name, 2)
    second = target.chips * target.slices * chip_of(target.generation).bf16_flops
    found = [
        Collective("collective-permute", "bf16", bytes, (0, 1), axis == "dcn", 1, False, "")
        for axis, bytes in sent.items()
    ]
    return step_of(StepFlops(0.75 * second, second, {}), {"fsdp": 1e9}, target, found)


def test_what_bounds_a_step():
    alone, sending = step_on("v5e-256"), step_on("v5e-256", ici=100e9, dcn=3e9)
    assert (alone["bound"], alone["dcn_seconds"], alone["excess"]) == (1, 0, 0)
    assert (sending["bound"], sending["excess"]) == (1, 103)
    assert sending["dcn_seconds"] == pytest.approx(3 / 3.125)


def test_a_chip_of_two_devices_sends_for_both():
    assert step_on("tpu7x-128", dcn=1e9)["dcn_seconds"] == pytest.approx(2e9 / CHIPS["tpu7x"].dcn_bandwidth)
