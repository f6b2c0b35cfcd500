"""A run that is killed at any moment ends as one that never was: 20 kills with the slow tests.

tests/benchmarks/kills.py has hundreds.
"""

import random

import pytest

from tests import kills


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[pytest.mark.slow] * (stage != "contrast")) for stage in kills.STAGES]
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(stage, tmp_path):
    seconds = kills.finish(stage, tmp_path / "whole")
    of_save = kills.Kills(stage, tmp_path / "killed", seconds, inside_a_save=True)
    drawn = random.Random(stage)
    of_save.of(2, drawn)
    kills.Kills(stage, tmp_path / "killed", seconds).of(2, drawn)
    kills.finish(stage, tmp_path / "killed")
    assert kills.differences(tmp_path / "whole" / stage, tmp_path / "killed" / stage) == []
