"""launch/colab.ipynb is executed: its code cells, in order, on the CPU and without a network."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from tests.launch_tools import LAUNCH, ROOT

NOTEBOOK = LAUNCH / "colab.ipynb"
STEPS = 3


def cells(kind="code"):
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def execute(sources, namespace):
    for number, source in enumerate(sources):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
    return namespace


def test_it_is_stored_without_outputs_and_asks_for_a_tpu():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"]["accelerator"] == "TPU" and notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty folder, one CPU device, programs that compile quickly, figures that nobody sees."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    for name, value in dict(STEPS=STEPS, XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="true", PIP_NO_INDEX=1).items():
        monkeypatch.setenv(name, str(value))
    yield tmp_path
    plt.close("all")


def test_it_runs_from_the_first_cell_to_the_last(quick, capsys):
    made = execute(cells(), {})
    assert made["ROOT"] == ROOT and made["RUN"].is_relative_to(quick)
    assert [step for step, _ in made["losses"]] == list(range(1, STEPS + 1))
    assert np.isfinite([loss for _, loss in made["losses"]]).all()
    printed = capsys.readouterr().out
    assert "CpuDevice" in printed and f"instruct  {STEPS}/{STEPS}" in printed and "accuracy" in printed


def install(namespace, monkeypatch, devices):
    """Executes the cell that installs, as if nothing were installed. -> The commands that it runs."""
    ran, real = [], importlib.util.find_spec
    monkeypatch.setattr("glob.glob", lambda pattern: [path for path in devices if path.startswith(pattern[:8])])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if ran else None)
    (source,) = [source for source in cells() if '"pip"' in source]
    namespace["sh"] = lambda *words, cwd=".": ran.append([str(word) for word in words])
    execute([source], namespace)
    return ran


@pytest.mark.parametrize("devices, extra", [([], ""), (["/dev/accel0"], "[tpu]"), (["/dev/vfio/0"], "[tpu]")])
def test_it_installs_what_the_machine_needs(quick, monkeypatch, devices, extra):
    monkeypatch.setenv("REPOSITORY", str(ROOT))
    monkeypatch.syspath_prepend(str(quick))  # the cell changes sys.path, which this puts back
    (made,) = install(execute(cells()[:2], {}), monkeypatch, devices)
    assert made[1:] == ["-m", "pip", "install", "--quiet", "--editable", f"{ROOT}{extra}"]


def test_it_clones_a_url(quick, monkeypatch):
    monkeypatch.setenv("REPOSITORY", "https://example.org/hovle_jax.git")
    monkeypatch.syspath_prepend(str(quick))
    pathlib.Path("hovle_jax_checkout").mkdir()
    pathlib.Path("hovle_jax_checkout/setup.py").touch()
    clone, made = install(execute(cells()[:2], {}), monkeypatch, [])
    assert clone == ["git", "clone", "--depth=1", "https://example.org/hovle_jax.git", "hovle_jax_checkout"]
    assert made[-1] == "hovle_jax_checkout"


def test_without_the_project_it_says_what_to_set(quick, monkeypatch):
    with pytest.raises(FileNotFoundError, match="set REPOSITORY to its git URL or folder"):
        install(execute(cells()[:2], {"__name__": "notebook"}), monkeypatch, [])
