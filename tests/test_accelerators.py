"""Where JAX would look in vain for a TPU the CPU is chosen before, and nowhere else."""

import importlib.util
import os
import subprocess
import sys

import pytest

from hovle_jax.system import accelerators, malloc
from tests.launch_tools import ROOT


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without accelerators, with libtpu, whose user has set nothing: the folder of its dev/ and sys/."""
    for name in (*accelerators.TPU_VARIABLES, "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(accelerators, "has_other_plugins", lambda: False)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    yield tmp_path
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)  # before the old value is put back


def add_pci(root, vendor, kind):
    folder = root / "sys/bus/pci/devices/0000:00:05.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def add_file(root, name):
    (root / name).parent.mkdir(parents=True)
    (root / name).touch()


def test_without_a_tpu_the_cpu_is_chosen(machine):
    assert accelerators.choose_cpu(machine) and os.environ["JAX_PLATFORMS"] == "cpu"


TPUS = {
    "a device file": lambda root: add_file(root, "dev/accel0"),
    "a vfio device": lambda root: add_file(root, "dev/vfio/0"),
    "a PCI device": lambda root: add_pci(root, "0x1ae0", "0x088000"),
}


@pytest.mark.parametrize("name", TPUS)
def test_a_tpu_is_left_to_jax(name, machine):
    TPUS[name](machine)
    assert accelerators.has_tpu(machine) and not accelerators.choose_cpu(machine)
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize("name", accelerators.TPU_VARIABLES)
def test_so_is_an_environment_that_names_one(name, machine, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert not accelerators.choose_cpu(machine)


@pytest.mark.parametrize(
    "vendor, kind",
    [("0x1ae0", "0x020000"), ("0x1ae0", "0x010802"), ("0x10de", "0x030200")],
    ids=["card", "disk", "gpu"],
)
def test_googles_network_cards_and_disks_are_no_tpus(vendor, kind, machine):
    add_pci(machine, vendor, kind)
    assert not accelerators.has_tpu(machine) and accelerators.choose_cpu(machine)


@pytest.mark.parametrize("platforms", ["tpu", "cuda", "tpu,cpu", "cpu"])
def test_a_users_choice_stays(platforms, machine, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not accelerators.choose_cpu(machine) and os.environ["JAX_PLATFORMS"] == platforms


def test_a_machine_with_another_plugin_keeps_it(machine, monkeypatch):
    monkeypatch.setattr(accelerators, "has_other_plugins", lambda: True)
    assert not accelerators.choose_cpu(machine)


def test_without_libtpu_nothing_is_said(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not accelerators.choose_cpu(machine)


def test_jax_that_is_imported_already_hears_of_it(machine, monkeypatch):
    told = []
    config = type("", (), {"update": staticmethod(lambda *words: told.append(words))})
    monkeypatch.setitem(sys.modules, "jax", type("", (), {"config": config}))
    assert accelerators.choose_cpu(machine) and told == [("jax_platforms", "cpu")]


def test_memory_is_kept_where_libtpu_finds_no_tpu(machine, monkeypatch):
    monkeypatch.setattr(malloc, "has_other_plugins", lambda: False)
    for found in (False, True):
        monkeypatch.setattr(malloc, "has_tpu", lambda: found)
        assert malloc.computes() is not found


CHILD = """
from hovle_jax.system import command_line
def main():
    import jax
    print(jax.devices()[0].platform)
command_line.run(main)
"""


@pytest.mark.skipif(
    accelerators.has_tpu() or accelerators.has_other_plugins(), reason="this machine has an accelerator"
)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_command_says_one_line_in_place_of_libtpus_five():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("JAX_PLATFORMS", None)
    result = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["cpu"]
    assert result.stderr.startswith("no TPU found") and len(result.stderr.splitlines()) == 1
