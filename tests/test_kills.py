"""A run that is killed at any moment ends as one that never was.

20 kills of a stage that costs next to nothing, and with the slow tests 4 of each real one; hundreds are killed by
tests/benchmarks/kills.py.
"""

import random
import shutil

import pytest

from tests import kills
from tests.killed_run import LINEAR


def survives(stage, folder, seconds, drawn, count):
    """Kills one run, alternately as a save has begun and at any moment -> how often. It then ends as the whole one."""
    done, run = 0, folder / "killed" / stage
    run.mkdir(parents=True)
    (run / "carried.json.1.partial").touch()  # a kill seldom comes just then
    for number in range(count):
        killed = kills.Kills(stage, folder / "killed", seconds, inside_a_save=number % 2 == 0).of(1, drawn)
        done += killed
        if not killed:
            break  # it was at its end
    kills.finish(stage, folder / "killed")
    assert kills.differences(folder / "whole" / stage, folder / "killed" / stage) == []
    return done


def test_a_run_takes_20_kills(tmp_path):
    kills.finish(LINEAR, tmp_path / "whole")
    seconds = kills.finish(LINEAR, tmp_path / "compiled")
    drawn, done = random.Random(16), 0
    for _ in range(20):  # runs, of which some may end before they are killed
        done += survives(LINEAR, tmp_path, seconds, drawn, min(5, 20 - done))
        shutil.rmtree(tmp_path / "killed")
        if done == 20:
            break
    assert done == 20


@pytest.mark.slow
@pytest.mark.parametrize("stage", kills.STAGES)
def test_a_run_that_is_killed_ends_as_one_that_is_not(stage, tmp_path):
    seconds = kills.finish(stage, tmp_path / "whole")
    survives(stage, tmp_path, seconds, random.Random(stage), 4)
