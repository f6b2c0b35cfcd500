"""`checkpoint list|inspect|verify|diff`: what a run has saved, and what is damaged."""

import json
import shutil

import numpy as np
import pytest
from flax import traverse_util

from hovle_jax.errors import UserError
from hovle_jax.training import inspecting
from tests import micro
from tests.test_commands import command
from tests.test_saves import flip, save, state_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints and a model."""
    folder = micro.finished_run(tmp_path_factory.mktemp("run"))
    save(folder, 1, 2)
    return folder


def said_of(*arguments, status=0):
    result = command("checkpoint", *arguments)
    assert (result.returncode, result.stderr) == (status, "")
    return result.stdout.splitlines()


def arrays(folder):
    return inspecting.leaves(inspecting.find(str(folder)))


def test_the_list_has_steps_sizes_and_states(run):
    rows = [line.split() for line in said_of("list", run)[1:]]
    assert [row[:2] for row in rows[:2]] == [["step", "1"], ["step", "2"]] and rows[2][0] == "model"
    assert all(row[-1] == "whole" for row in rows)
    (newest,) = [saved for saved in inspecting.saved_in(str(run)) if saved.name == "step 2"]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "2").rglob("*") if path.is_file())
    assert newest.size() == size and rows[1][2] == f"{size:,}"


def test_inspect_has_every_array_with_its_norm(run):
    found = json.loads(said_of("inspect", run / "checkpoints" / "2", "--json")[0])["arrays"]
    kernel = np.asarray(state_of(2).trained["a"]["kernel"])
    assert found["step"] == {"shape": [], "dtype": "int32", "norm": 2.0}
    assert found["trained/a/kernel"]["norm"] == pytest.approx(np.linalg.norm(kernel), rel=1e-6)
    assert found["trained/a/kernel"]["shape"] == [40, 40] and len(found) == 3
    np.testing.assert_array_equal(arrays(run / "checkpoints" / "2")["trained/a/kernel"].read(), kernel)


def test_a_model_has_its_components(run):
    found, weights = arrays(run / "model"), micro.params(micro.run_config("instruct"))
    weights = {name: weights[name] for name in ("embedding", "llm")}
    wanted = traverse_util.flatten_dict(weights, sep="/")
    assert found.keys() == wanted.keys() and len(found) > 20
    for path in list(found)[:3]:
        np.testing.assert_array_equal(found[path].read(), np.asarray(wanted[path]))


def test_verify_ends_with_status_1_at_damage(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert [saved.damage() for saved in inspecting.saved_in(str(copy))] == [[]] * 3
    flip(next((copy / "checkpoints" / "2" / "default" / "d").iterdir()), 100)
    lines = said_of("verify", copy, status=1)
    assert lines[0].endswith("1: whole") and lines[3].endswith("model: whole") and len(lines) == 4
    assert lines[1].endswith("2: DAMAGED") and "is not what was written" in lines[2]
    (row,) = [saved.row() for saved in inspecting.saved_in(str(copy)) if saved.name == "step 2"]
    assert row["state"].startswith("damaged: default/d/")
    (copy / "checkpoints" / "2" / "default" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="default cannot be read"):
        arrays(copy / "checkpoints" / "2")


def test_diff_names_the_arrays_that_differ(run):
    lines = said_of("diff", run / "checkpoints" / "1", run, "--json", status=1)  # of a run the newest: its model
    found = json.loads(lines[0])
    assert found["equal"] == 0 and found["different"]["step"] == f"only in {run / 'checkpoints' / '1'}"
    lines = said_of("diff", run / "checkpoints" / "1", run / "checkpoints" / "2", status=1)
    gap = np.abs(np.asarray(state_of(1).opt_state[0]) - np.asarray(state_of(2).opt_state[0])).max()
    assert f"opt_state/0       differs by up to {gap:.3g}" in lines and lines[-1] == "0 arrays are bit-equal"


def test_differences_are_found_in_every_bit():
    zeros = np.zeros(3, np.float32)
    assert inspecting.difference(zeros, zeros) == 0
    assert inspecting.difference(zeros, np.float32([0, 0, 2])) == 2
    assert np.isnan(inspecting.difference(zeros, np.float32([0, np.nan, 2])))
    assert inspecting.difference(np.float32([np.nan]), np.float32([np.nan])) == 0


def test_a_folder_without_saves_is_named(tmp_path):
    with pytest.raises(UserError, match="has neither checkpoints nor a model; give the folder of a run"):
        inspecting.saved_in(str(tmp_path))
    with pytest.raises(UserError, match="has neither"):
        inspecting.find(str(tmp_path / "nowhere"))
