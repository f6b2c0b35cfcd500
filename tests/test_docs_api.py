"""The pages of the API are made from the docstrings, where pdoc is installed."""

import os
import subprocess
import sys

import pytest

from tests.launch_tools import ROOT

pytest.importorskip("pdoc", reason="the extra docs is not installed")


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
