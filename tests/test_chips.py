"""TPU slices by name, published peaks, and the bounds that follow from them."""

import dataclasses
import importlib.util

import micro
import pytest

from hovle_jax.aot.hlo.collectives import Collective
from hovle_jax.aot.roofline import hbm_bytes, network_bytes, roofline
from hovle_jax.errors import UserError
from hovle_jax.hardware import topology
from hovle_jax.hardware.chips import CHIPS, chip_of
from hovle_jax.training.flops import StepFlops

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


# Slices


@pytest.mark.parametrize(
    "name, libtpu, chips, hosts",
    [
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("V5P-128", "v5p:4x4x4", 64, 16),
        ("v5p-12288", "v5p:16x16x24", 6144, 1536),
        ("v6e-64", "v6e:8x8", 64, 16),
        ("v6e-1", "v6e:1x1", 1, 1),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v4-32", "v4:2x2x4", 16, 4),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 16),
        ("v5e:4x8", "v5e:4x8", 32, 8),
        ("v5p:4x4x12", "v5p:4x4x12", 192, 48),
    ],
)
def test_names_of_slices(name, libtpu, chips, hosts):
    found = topology.find(name)
    assert (found.libtpu_name, found.chips, found.hosts) == (libtpu, chips, hosts)
    assert topology.find(found.libtpu_name) == found
    assert topology.find(found.cloud_name).chips == chips


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
    links = {name: topology.find(name).links for name in ("v5e-256", "v5e-128", "v5e-64", "v5e-1", "v5p-128", "v5p-32")}
    assert links == {"v5e-256": 4, "v5e-128": 3, "v5e-64": 2, "v5e-1": 0, "v5p-128": 6, "v5p-32": 3}


@needs_libtpu
def test_libtpu_has_these_devices():
    for name in ("v4-32", "v5e-1", "v5e-256", "v5p-8", "v5p-128", "v6e-64", "tpu7x-16"):
        assert len(topology.devices(name)) == topology.find(name).devices, name
    two = topology.devices("v5e-16", slices=2)
    assert [d.slice_index for d in two] == [0] * 16 + [1] * 16


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e-16 needs libtpu.*hovle_jax\[tpu\]"):
        topology.devices("v5e-16")


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
        axes = topology.GENERATIONS[key].dimensions if key in topology.GENERATIONS else 0
        assert chip.ici_links == 2 * axes


def test_a_slice_without_rings_has_half_of_its_links():
    chip = CHIPS["v5e"]
    assert chip.slice_bandwidth(topology.find("v5e-256")) == 200e9
    assert chip.slice_bandwidth(topology.find("v5e-16")) == 100e9
    assert CHIPS["h100"].slice_bandwidth() == 450e9


# Bounds


def bounds(**bytes_moved):
    """Of a step of a second's hardware FLOPs on 4 v5e, three quarters of them the model's."""
    second = 4 * 197e12
    return roofline(StepFlops(0.75 * second, second, {}), CHIPS["v5e"], 4, **bytes_moved)


def test_what_bounds_a_step():
    free = bounds()
    assert (free.bottleneck, free.seconds, free.mfu) == ("compute", 1.0, 0.75)
    assert bounds(hbm=819e9 / 2, ici=100e9, dcn=3e9).bottleneck == "compute"
    for name, full in dict(hbm=819e9, ici=200e9, dcn=3.125e9).items():
        found = bounds(**{name: 3 * full})
        assert found.bottleneck == {"hbm": "memory"}.get(name, name)
        assert (found.seconds, found.mfu) == (pytest.approx(3), pytest.approx(0.25))


def test_a_slice_of_lines_doubles_the_time_of_its_network():
    whole, lines = (bounds(ici=1e11, topology=topology.find(name)).ici for name in ("v5e-256", "v5e-16"))
    assert lines == 2 * whole


def test_bytes_within_and_between_slices():
    made = [
        Collective("all-gather", "bf16", 100, 4, False, 3, False, "", ""),
        Collective("all-reduce", "f32", 100, 2, True, 2, True, "", ""),
    ]
    assert network_bytes(made) == (900, 200)
    assert network_bytes(made, devices_per_chip=2) == (1800, 400)


def test_memory_traffic():
    config = micro.run_config("align", data=dict(batch_size=8, sequence_length=64))
    # Of 1000 parameters in bf16, two gathers, written and read; of 1000 trained ones on a quarter of the chips four
    # float32 numbers (the parameter, two moments, the gradient), read and written.
    assert hbm_bytes(config, 4, 1000, 0, rows=0) == 8_000
    assert hbm_bytes(config, 4, 0, 1000, rows=0) == 8_000
    rematerialised = dataclasses.replace(config, execution=dataclasses.replace(config.execution, remat="full"))
    once = hbm_bytes(config, 4, 0, 0)
    assert hbm_bytes(rematerialised, 4, 0, 0) == pytest.approx(4 / 3 * once)  # a second forward pass to the three
    assert hbm_bytes(config, 8, 0, 0) == once / 2 and hbm_bytes(config, 4, 0, 0, rows=16) == 2 * once
