"""Sides of a comparison in processes of their own, which take turns of a few steps, so that a busy time hits both."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hovle_jax.system import malloc

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHECKED_STEPS = 3


def serve(steps: Iterator[float]) -> None:
    """A child: first the losses of the checked steps, then for each number on stdin the seconds of so many steps."""
    print(json.dumps([next(steps) for _ in range(CHECKED_STEPS)]), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), flush=True)


def as_a_child() -> None:
    """How a process begins that is a side: on the CPU, keeping freed memory, as every command of this project does."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    malloc.keep_freed_memory()


class Child:
    """One side in its own process; it works only while it is asked to."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.losses, self.seconds = self._answer(), []

    def take_turn(self, steps: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.seconds += self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} failed")
        return json.loads(line)


def compare(commands: Mapping[str, list[str]], rounds: int, steps: int, rtol: float = 1e-4) -> dict[str, dict]:
    """Runs the sides, whose first losses must agree.

    Args:
      commands: {side: its command line}; one is 'ours'.
      rounds, steps: how often each takes its turn, of how many steps.
    Returns:
      {'seconds': {side: median}, 'ratio': {side of a peer: its median over ours}}.
    """
    children = {side: Child(command) for side, command in commands.items()}
    for child in children.values():
        np.testing.assert_allclose(child.losses, children["ours"].losses, rtol=rtol)
    for _ in range(rounds):
        for child in children.values():
            child.take_turn(steps)
    for child in children.values():
        child.close()
    medians = {side: statistics.median(child.seconds) for side, child in children.items()}
    return {
        "seconds": {side: round(value, 4) for side, value in medians.items()},
        "ratio": {side: round(value / medians["ours"], 3) for side, value in medians.items() if side != "ours"},
    }


def command_of(script: str, side: str, case: str) -> list[str]:
    """Of a benchmark's file, which is a side where it is called with `--child SIDE --sizes CASE`."""
    return [sys.executable, "-m", f"tests.benchmarks.{pathlib.Path(script).stem}", "--child", side, "--sizes", case]


def main(doc: str, script: str, sides: Mapping[str, Callable], sizes: Mapping[str, tuple]) -> None:
    """The command line of such a benchmark: prints one JSON object, or is a side of it.

    Args:
      doc: says what is compared.
      script: the benchmark's file.
      sides: {name: function of a size -> endless steps, each giving its loss}; one is 'ours'.
      sizes: {name: arguments of these functions}.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(sizes))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="of each turn")
    parser.add_argument("--child", choices=sides, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        as_a_child()
        serve(sides[arguments.child](*sizes[arguments.sizes]))
        return
    found: dict = {"cores": os.cpu_count()}
    for size in arguments.sizes.split(","):
        commands = {side: command_of(script, side, size) for side in sides}
        found[size] = compare(commands, arguments.rounds, arguments.steps)
    print(json.dumps(found, indent=2))
