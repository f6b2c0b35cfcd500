"""launch/worker.sh and launch/pod.sh with real processes: a stand-in for Python takes the place of the training."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch_tools import LAUNCH

# Writes down its arguments, then waits to be told to end, as a long training would; CODE ends it at once.
TRAINING = """#!/usr/bin/env bash
printf '%s|' "$@" "$EXTRA"; echo
if [[ -n "${CODE:-}" ]]; then exit "$CODE"; fi
trap 'echo saved; exit 143' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the scripts and a stand-in for its Python; what it started is ended afterwards."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for python in (tmp_path / ".venv" / "bin" / "python", tmp_path / "bin" / "python"):
        python.parent.mkdir(parents=True)
        python.write_text(TRAINING)
        python.chmod(0o755)
    yield tmp_path
    pid = tmp_path / ".launch" / "pid"
    if pid.exists():
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def worker(checkout, *words, **variables):
    """Runs worker.sh as ssh would, from another folder."""
    line = ["bash", str(checkout / "launch" / "worker.sh"), *words]
    env = {**os.environ, "EXTRA": "", **variables}
    return subprocess.run(
        line, cwd="/", env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen within 20 s"
        time.sleep(0.05)


def state(checkout):
    return worker(checkout, "status").stdout.split(": ")[1].strip()


def log(checkout):
    return (checkout / ".launch" / "log").read_text()


def test_a_run_goes_on_in_a_session_of_its_own_and_can_be_ended(checkout):
    assert state(checkout) == "not running"
    started = worker(checkout, "start", "--config", "configs/a b.py", EXTRA="from the environment")
    assert started.returncode == 0 and "started" in started.stdout, started.stderr
    assert state(checkout) == "running"
    pid = int((checkout / ".launch" / "pid").read_text())
    assert os.getsid(pid) == pid  # the end of an ssh session does not reach it
    wait_for(lambda: "-m|hovle_jax.train|--config|configs/a b.py|from the environment|" in log(checkout))
    assert "python -m hovle_jax.train --config configs/a\\ b.py" in log(checkout)

    again = worker(checkout, "start", "--config", "b")
    assert again.returncode == 1 and "a run is going on" in again.stderr and "stop it first" in again.stderr
    assert state(checkout) == "running"

    assert worker(checkout, "stop").returncode == 0
    assert state(checkout) == "not running" and "saved" in log(checkout)  # it was asked, not killed
    assert worker(checkout, "stop").returncode == 0


@pytest.mark.parametrize(
    "code, expected", [("0", "finished"), ("143", "stopped"), ("75", "stopped"), ("2", "failed with code 2")]
)
def test_how_a_run_ended_is_known(checkout, code, expected):
    worker(checkout, "start", "--a", CODE=code)
    wait_for(lambda: state(checkout) == expected)
    worker(checkout, "start", "--b")
    assert state(checkout) == "running" and log(checkout).count("== ") == 2


@pytest.mark.parametrize("words", [["--workdir", "{}/runs"], ["--workdir={}/runs", "--a"]])
def test_a_log_outlives_its_machine(checkout, words, tmp_path):
    kept = tmp_path / "runs" / "logs" / f"{os.uname().nodename}.log"
    worker(checkout, "start", *(word.format(tmp_path) for word in words))
    assert worker(checkout, "stop").returncode == 0
    wait_for(lambda: kept.exists() and kept.read_text() == log(checkout))
    assert "saved" in kept.read_text()


def test_a_machine_that_was_started_anew_has_no_run(checkout):
    worker(checkout, "start", "--a", CODE="1")
    wait_for(lambda: state(checkout) == "failed with code 1")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (checkout / ".launch" / "code").unlink()
    (checkout / ".launch" / "pid").write_text(str(ended.pid))
    assert state(checkout) == "not running"


def test_logs_follow_and_name_the_host(checkout):
    worker(checkout, "start", "--a", CODE="0")
    wait_for(lambda: state(checkout) == "finished")
    line = ["bash", str(checkout / "launch" / "worker.sh"), "logs", "label"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as following:
        lines = [following.stdout.readline() for _ in range(2)]
        os.killpg(following.pid, signal.SIGTERM)
    assert all(line.startswith(f"{os.uname().nodename}: ") for line in lines) and "hovle_jax.train" in lines[1]


def test_install_makes_the_environment_and_mounts_the_bucket(checkout, tmp_path):
    """The tools of a worker are stand-ins that write down their arguments."""
    calls = tmp_path / "calls"
    for tool in ("uv", "sudo", "gcsfuse", "mountpoint", "curl"):
        path = checkout / "bin" / tool
        path.write_text(f'#!/bin/sh\necho "{tool} $*" >>{calls}\n[ {tool} != mountpoint ]\n')
        path.chmod(0o755)
    variables = dict(PATH=f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}", HOME=str(tmp_path))
    result = worker(checkout, "install", "my-bucket", **variables)
    assert result.returncode == 0, result.stderr
    made = calls.read_text().splitlines()
    assert made[:2] == [
        "uv venv --quiet --allow-existing --python 3.12 .venv",
        "uv pip install --quiet --python .venv/bin/python --constraint requirements/py312.txt --editable .[tpu,data]",
    ]
    assert made[2:4] == ["mountpoint --quiet /mnt/hovle", "sudo mkdir -p /mnt/hovle"]
    assert made[4].startswith("sudo gcsfuse ") and made[4].endswith(" my-bucket /mnt/hovle")

    worker(checkout, "start", "--a", **variables)  # mounted again: the machine may have been started anew
    assert calls.read_text().splitlines()[5:] == made[2:]


def pod(checkout, *words, **variables):
    env = {**os.environ, "PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}", "EXTRA": "", **variables}
    line = ["bash", str(pathlib.Path(checkout) / "launch" / "pod.sh"), *words]
    return subprocess.Popen(line, cwd=checkout, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_pod_ends_as_its_training_does(checkout, code):
    with pod(checkout, "--config", "a b", CODE=str(code)) as process:
        assert process.stdout.read() == "-m|hovle_jax.train|--config|a b||\n"
    assert process.returncode == code


def test_a_pod_that_is_preempted_saves_and_asks_to_be_started_again(checkout):
    with pod(checkout, "--config", "a") as process:
        process.stdout.readline()
        time.sleep(0.2)  # the stand-in is ready for the signal once its first line is out
        process.terminate()
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 143
