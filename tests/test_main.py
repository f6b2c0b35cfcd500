"""`python -m hovle_jax` and `hovle`: a list of the commands, and each of them by name."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from hovle_jax import __main__ as entry
from tests.launch_tools import ROOT

SCRIPT = "import sys; from hovle_jax.__main__ import main; sys.argv[0] = 'hovle'; main()"


def hovle(*arguments, line=("-m", "hovle_jax")):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *line, *arguments], env=env, capture_output=True, text=True, check=False)


def test_the_list_has_every_command_with_its_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hovle"])
    entry.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    named = {line.split()[0] for line in lines}
    package = pathlib.Path(entry.__file__).parent
    runnable = [path for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert named == {path.stem for path in runnable} - {"__main__"} | {"aot"} >= {"train", "generate", "evaluate"}
    assert all(len(line.split()) > 3 for line in lines)


def test_the_list_imports_no_jax():
    code = (
        "import sys\nsys.argv = ['hovle']\nfrom hovle_jax.__main__ import main\nmain()\nassert 'jax' not in sys.modules"
    )
    assert hovle(line=("-c", code)).returncode == 0


@pytest.mark.parametrize("line", [("-m", "hovle_jax"), ("-c", SCRIPT)], ids=["module", "script"])
def test_a_command_runs_as_its_module_does(line):
    arguments = ["--config", "configs/pretrain.py", "--config.optimizer.lr=1"]
    result = hovle("train", *arguments, line=line)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == hovle(*arguments, line=("-m", "hovle_jax.train")).stderr
    assert "did you mean --config.optimizer.learning_rate?" in result.stderr


def test_help_is_the_commands_own():
    assert hovle("evaluate", "--help").stdout.startswith(
        "Scores a finished run on a benchmark, or on data of your own."
    )


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("trian", "did you mean train?"),
        ("xyzzy", "use one of aot, attention, bench, chat, checkpoint, classify, compare, convert, "),
    ],
)
def test_an_unknown_command_is_one_line(name, remedy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hovle", name])
    monkeypatch.setattr(runpy, "run_module", None)
    with pytest.raises(SystemExit, match="2"):
        entry.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: unknown command '{name}'") and remedy in line
