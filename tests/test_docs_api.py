"""The pages of the API are made from the docstrings, where pdoc is installed."""

import os
import subprocess
import sys

import pytest

from tests.launch_tools import ROOT

pytest.importorskip("pdoc", reason="the extra docs is not installed")


def test_every_module_but_the_commands_is_listed(tmp_path):
    """As pdoc finds them by what the script asks for, and one page."""
    code = f"""
import pathlib, runpy, pdoc, pdoc.extract
asked = []
real, pdoc.pdoc = pdoc.pdoc, lambda *specs, output_directory: asked.extend(specs)
runpy.run_path("docs/api.py")["write"](None)
print(*pdoc.extract.walk_specs(asked))
real("hovle_jax.system.config_help", output_directory=pathlib.Path({str(tmp_path)!r}))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    found = set(result.stdout.split())
    assert {"hovle_jax", "hovle_jax.model.hovle", "hovle_jax.aot.hlo.collectives"} <= found
    assert not {"hovle_jax.train", "hovle_jax.aot.__main__"} & found
    (page,) = tmp_path.rglob("config_help.html")
    assert "All keys of a config" in page.read_text()


@pytest.mark.slow
def test_every_module_but_the_commands_has_a_page(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "docs/api.py", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    made = {str(path.relative_to(tmp_path).with_suffix("")) for path in tmp_path.rglob("*.html")}
    assert {"index", "hovle_jax", "hovle_jax/model/hovle", "hovle_jax/aot/hlo/collectives"} <= made
    assert not {"hovle_jax/train", "hovle_jax/aot/__main__"} & made
    page = (tmp_path / "hovle_jax" / "system" / "config_help.html").read_text()
    assert "All keys of a config" in page
