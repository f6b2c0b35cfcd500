"""Runs the scripts of launch/ with stand-ins for gcloud, xpk, kubectl and docker, which record their calls."""

import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# A tool that writes down its arguments, one call a line. Its folder holds what it answers:
#   states    what is said of a queued resource, one call a line; the last one stays; GONE: it is not found
#   workers   what the workers say about the run
STAND_IN = """#!/usr/bin/env bash
cd "$(dirname "$0")"
{ printf '%q ' "${0##*/}" "$@"; echo; } >>calls
case "$*" in
  *" tpu-vm describe "*) echo "state: READY" ;;
  *" describe "*)
    state=$(head -n 1 states)
    if [[ $(wc -l <states) -gt 1 ]]; then sed -i 1d states; fi
    case $state in
      GONE) echo "ERROR: NOT_FOUND: Resource 'hovle' was not found" >&2; exit 1 ;;
      DENIED) echo "ERROR: PERMISSION_DENIED: ask the owner" >&2; exit 1 ;;
      *) echo "a warning that is no state" >&2; echo "$state" ;;
    esac ;;
  *"worker.sh status"*) cat workers ;;
  "apply "*) cat >applied ;;
esac
"""
TOOLS = ("gcloud", "xpk", "kubectl", "docker")


def run_script(name, *arguments, tools=None, **variables):
    """Runs launch/NAME; `tools` is a folder that goes before PATH, `variables` are set in its environment."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HOVLE_")}
    if tools:
        env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    line = ["bash", str(LAUNCH / name), *map(str, arguments)]
    return subprocess.run(
        line, env=env | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def commands(text):
    """The commands of a dry run, each as a list of words."""
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


class Tools:
    """A folder of stand-ins.

    Attributes:
      path: the folder.
    """

    def __init__(self, path):
        self.path = path
        for name in TOOLS:
            (path / name).write_text(STAND_IN)
            (path / name).chmod(0o755)

    def answer(self, states=("GONE",), workers=()):
        (self.path / "states").write_text("".join(f"{state}\n" for state in states))
        (self.path / "workers").write_text("".join(f"{line}\n" for line in workers))

    @property
    def calls(self):
        """The calls so far, each as a list of words."""
        path = self.path / "calls"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools").mkdir()
    return Tools(tmp_path / "tools")
