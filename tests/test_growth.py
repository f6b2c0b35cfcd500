"""The benchmark of how a step grows starts, and writes what it measured."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "benchmarks" / "growth.py"


@pytest.mark.slow
def test_a_quick_run_measures_draws_and_prints_growth(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--axes", "layers,devices", "--out", tmp_path]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiles sooner
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert "compile time, 8 layers / 2 layers: " in ran.stdout
    axes = json.loads((tmp_path / "growth.json").read_text())["axes"]
    layers, devices = axes["layers"], axes["devices"]
    assert [row["layers"] for row in layers] == [2, 8] and [row["devices"] for row in devices] == [1, 2]
    assert layers[0] == devices[0]  # the same point, measured once
    for row in layers + devices:
        assert row["tokens_per_second"] > 0 and row["compile_seconds"] > 0
    assert layers[1]["bytes_per_device"] > layers[0]["bytes_per_device"] > devices[1]["bytes_per_device"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
