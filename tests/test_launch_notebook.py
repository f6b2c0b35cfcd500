"""launch/colab.ipynb is executed: its code cells, in order, on the CPU and without a network."""

import importlib.util
import json
import pathlib
import shutil
import sys
import types

import pytest

from tests.launch_tools import LAUNCH, ROOT

NOTEBOOK = LAUNCH / "colab.ipynb"
STEPS = 3


def cells(kind="code"):
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def cell_with(text):
    (source,) = [source for source in cells() if text in source]
    return source


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
def shown(monkeypatch):
    """What cells display, as a list of (kind, data or file)."""
    found = []
    html = lambda data: ("html", data)
    image = lambda filename, width: ("image", filename)
    parts = dict(HTML=html, Image=image, display=found.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(**parts))
    return found


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty folder, one CPU device, programs that compile quickly, a user who has set nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("PROJECT", "IMAGE", "DRIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(STEPS=STEPS, XLA_FLAGS="", JAX_DISABLE_MOST_OPTIMIZATIONS="true", PIP_NO_INDEX=1).items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


@pytest.fixture
def colab(monkeypatch):
    """google.colab, whose user uploads the file of this name: -> a namespace with `file` and what was `mounted`."""
    said = types.SimpleNamespace(file="hovle_jax.zip", mounted=[])
    files = types.SimpleNamespace(upload=lambda: {said.file: b""})
    drive = types.SimpleNamespace(mount=said.mounted.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files, drive=drive))
    return said


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(quick, shown, monkeypatch, capsys):
    monkeypatch.setenv("IMAGE", str(ROOT / "docs" / "example.png"))
    made = execute(cells(), {})
    assert made["ROOT"] == ROOT and made["RUN"].is_relative_to(quick)
    printed = capsys.readouterr().out
    assert "CpuDevice" in printed and f"instruct  {STEPS}/{STEPS}" in printed and "accuracy" in printed
    (page,) = [data for kind, data in shown if kind == "html"]
    assert page.startswith("<iframe") and "data:image/png;base64," in page
    assert "src=&quot;first_batch.png&quot;" not in page and "src=&quot;metrics.png&quot;" not in page
    assert [pathlib.Path(file).name for kind, file in shown if kind == "image"] == ["example.png"] * 2
    assert list((made["RUN"] / "checkpoints").iterdir())


def test_it_asks_about_an_uploaded_image(quick, shown, colab):
    colab.file = "mine.png"
    asked = []
    execute([cell_with("QUESTION =")], execute(cells()[:2], {}) | {"ask": lambda *words: asked.append(words)})
    assert asked == [("mine.png", "what shape is in the image?")]


def test_without_an_image_it_says_what_to_set(quick, capsys):
    execute([cell_with("QUESTION =")], execute(cells()[:2], {}))
    assert "set IMAGE to the path of an image" in capsys.readouterr().out


def test_runs_are_kept_in_a_mounted_drive(quick, colab, monkeypatch):
    monkeypatch.setenv("DRIVE", "1")
    made = execute(cells()[:2], {}) | {"sh": lambda *words, cwd=".": None}
    execute([cell_with("drive.mount")], made)
    assert colab.mounted == ["/content/drive"] and str(made["RUN"]).startswith("/content/drive/MyDrive/")


def install(namespace, monkeypatch, devices=()):
    """Executes the cell that installs, as if nothing were installed. -> The commands that it runs."""
    ran, real = [], importlib.util.find_spec
    monkeypatch.setattr("glob.glob", lambda pattern: [path for path in devices if path.startswith(pattern[:8])])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if ran else None)
    namespace["sh"] = lambda *words, cwd=".": ran.append([str(word) for word in words])
    execute([cell_with('"pip"')], namespace)
    return ran


@pytest.fixture
def path_back(quick, monkeypatch):
    """The cell that installs changes sys.path, which this puts back."""
    monkeypatch.syspath_prepend(str(quick))


@pytest.mark.parametrize(
    "devices, extra",
    [([], ""), (["/dev/accel0"], "[tpu]"), (["/dev/vfio/0"], "[tpu]"), (["/dev/nvidia0"], "[cuda]")],
)
def test_it_installs_what_the_machine_needs(quick, path_back, monkeypatch, devices, extra):
    monkeypatch.setenv("PROJECT", str(ROOT))
    (made,) = install(execute(cells()[:2], {}), monkeypatch, devices)
    assert made[1:] == ["-m", "pip", "install", "--quiet", "--editable", f"{ROOT}{extra}"]


def test_it_clones_a_url(quick, path_back, monkeypatch):
    monkeypatch.setenv("PROJECT", "https://example.org/hovle_jax.git")
    pathlib.Path("hovle_jax_checkout").mkdir()
    pathlib.Path("hovle_jax_checkout/setup.py").touch()
    clone, made = install(execute(cells()[:2], {}), monkeypatch)
    assert clone == ["git", "clone", "--depth=1", "https://example.org/hovle_jax.git", "hovle_jax_checkout"]
    assert made[-1] == "hovle_jax_checkout"


@pytest.fixture
def zipped(quick):
    """hovle_jax.zip in the current folder, with the project in a folder of its own."""
    project = quick / "packing" / "hovle_jax-main"
    (project / "tests").mkdir(parents=True)
    for name in ("setup.py", "tests/setup.py"):
        (project / name).touch()
    shutil.make_archive("hovle_jax", "zip", quick / "packing")
    shutil.rmtree(quick / "packing")


def test_it_unpacks_a_zip(zipped, path_back, monkeypatch):
    monkeypatch.setenv("PROJECT", "hovle_jax.zip")
    (made,) = install(execute(cells()[:2], {}), monkeypatch)
    assert made[-1] == "hovle_jax_unpacked/hovle_jax-main"


def test_without_an_address_colab_asks_for_a_zip(zipped, path_back, colab, monkeypatch, capsys):
    (made,) = install(execute(cells()[:2], {}), monkeypatch)
    assert made[-1] == "hovle_jax_unpacked/hovle_jax-main"
    printed = capsys.readouterr().out
    assert "PROJECT is not set" in printed and "choose a .zip of the project's folder" in printed


def test_without_the_project_it_says_what_to_set(quick, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="PROJECT is not set"):
        install(execute(cells()[:2], {"__name__": "notebook"}), monkeypatch)
    assert 'PROJECT = "https://' in capsys.readouterr().out


def test_an_address_without_the_project_is_named(quick, monkeypatch):
    monkeypatch.setenv("PROJECT", str(quick))
    with pytest.raises(FileNotFoundError, match=f"no project in {quick}: set PROJECT to its git URL"):
        install(execute(cells()[:2], {}), monkeypatch)


def test_an_old_python_is_named(quick, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10))
    with pytest.raises(RuntimeError, match="Python 3.11 or newer is needed"):
        execute(cells()[:2], {})
