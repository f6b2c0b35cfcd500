"""The loop: resuming, held-out metrics, stopping."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hovle_jax.components import COMPONENTS
from hovle_jax.config import ExecutionConfig
from hovle_jax.errors import UserError
from hovle_jax.report.goodput import read_time
from hovle_jax.report.metrics import is_measured, read_metrics
from hovle_jax.training import loop, saved_steps
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import step_folders
from hovle_jax.training.stages import STAGES
from tests import killed_run, micro

pytestmark = pytest.mark.usefixtures("quick_compilation")


# The stage that compiles fastest.
LOOP = micro.run_config("contrast", steps=5, log_every=2, checkpoint_every=3, execution=ExecutionConfig(dtype="auto"))


def saved(folder, step):
    """Everything in a checkpoint, and the finished model: {path: array}."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "checkpoints" / str(step) / "default")
        model = {c: checkpointer.restore(folder / "model" / c) for c in ("clip",)}
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "model": model})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def quiet(line):
    pass


def rows_but_times(folder):
    """The rows of metrics without what a clock has measured; a row of times alone is none."""
    rows = [{name: v for name, v in row.items() if not is_measured(name)} for row in read_metrics(folder)]
    return [row for row in rows if row.keys() > {"step"}]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, micro_corpus):
    whole, cut, killed = (tmp_path / name for name in ("whole", "cut", "killed"))
    result = loop.run(LOOP, whole, {}, say=quiet)
    assert (result.step, result.finished) == (5, True)
    stopped = loop.run(dataclasses.replace(LOOP, stop_at_step=1), cut, {}, say=quiet)
    assert (stopped.step, stopped.finished) == (1, False) and not (cut / "model").exists()
    assert rows_but_times(cut) == []  # a row of step 1 would be one that the whole run does not have
    said = []
    assert loop.run(LOOP, cut, {}, say=said.append).finished
    assert "contrast: resuming at step 1" in said
    # Killed after step 5 without a checkpoint of it: what was written after step 3 happens again.
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "5")
    shutil.rmtree(killed / "model")
    said.clear()
    assert loop.run(LOOP, killed, {}, say=said.append).finished
    assert "contrast: resuming at step 3" in said
    expected = saved(whole, 5)
    assert len(expected) > 100 and int(expected["['state']['step']"]) == 5
    assert [row["step"] for row in rows_but_times(whole)] == [2, 4, 5]
    for folder in (cut, killed):
        got = saved(folder, 5)
        assert got.keys() == expected.keys()
        for path, leaf in expected.items():
            assert leaf.tobytes() == got[path].tobytes(), f"{folder.name}: {path}"
        # Rows are means over the steps since the row before, also over a cut between them.
        assert rows_but_times(folder) == rows_but_times(whole)
    # The time of the killed process' last step was for nothing.
    assert read_time(cut)[1]["lost"] == 0 < read_time(killed)[1]["lost"]
    for name in ("config.json", "tokenizer.model", "first_batch.png"):
        assert (whole / name).stat().st_size > 0
    # Another seed in the same folder would mix two runs.
    with pytest.raises(UserError, match="holds a run with seed=0, not 7; choose another --workdir"):
        loop.run(dataclasses.replace(LOOP, seed=7), whole, {}, say=quiet)
    changed = dataclasses.replace(LOOP, optimizer=dataclasses.replace(LOOP.optimizer, learning_rate=1e-4, b1=0.5))
    with pytest.raises(UserError, match=r"optimizer.b1=0.9, not 0.5, optimizer.learning_rate=0.01, not 0.0001; choose"):
        loop.run(changed, whole, {}, say=quiet)


@pytest.mark.slow
def test_the_held_out_loss_is_written_at_its_steps(tmp_path, micro_corpus):
    config = micro.run_config("distill", steps=3, log_every=3, eval_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = loop.run(config, whole, {}, say=quiet)
    assert list(result.held_out) == [0, 2, 3]
    losses = {step: metrics["loss"] for step, metrics in result.held_out.items()}
    assert losses[3] < losses[0]
    for metrics in result.held_out.values():
        assert metrics["loss"] == pytest.approx(-metrics["image_cosine"] - metrics["text_cosine"], abs=1e-5)
    written = {row["step"]: row.get("held_out/loss") for row in read_metrics(whole)}
    assert written == pytest.approx(losses)
    # The teacher, the head and the part of the LLM that this stage reads are not its result.
    assert {path.name for path in (whole / "model").iterdir()} >= {"config.json", "embedding"}
    assert not (whole / "model" / "teacher").exists()
    # A run that is stopped at such a step is not kept waiting: the resumed one evaluates.
    loop.run(dataclasses.replace(config, stop_at_step=2), cut, {}, say=quiet)
    assert [row["step"] for row in rows_but_times(cut)] == [0]
    resumed = loop.run(config, cut, {}, say=quiet)
    assert rows_but_times(cut) == rows_but_times(whole) and resumed.held_out == result.held_out


def test_a_checkpoint_at_which_a_run_was_stopped_gets_its_held_out_metrics(tmp_path, micro_corpus, monkeypatch):
    """And is the best one then, as in a run that went on."""
    for table, rows in zip((STAGES, COMPONENTS), killed_run.linear()):
        for name, row in rows.items():
            monkeypatch.setitem(table, name, row)
    losses = iter([9.0, 1.0, 2.0, 3.0])  # before the first step, and after 2, 4 and 6
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
    often = dict(steps=6, checkpoint_every=2, eval_every=2, keep_checkpoints=1, keep_best="loss")
    config = killed_run.config_of(killed_run.LINEAR, **often)
    loop.run(dataclasses.replace(config, stop_at_step=2), tmp_path, {}, say=quiet)
    loop.run(config, tmp_path, {}, say=quiet)
    kept = saved_steps.step_folders(tmp_path / "checkpoints")
    noted = {step: saved_steps.note_of(path)["held_out"] for step, path in kept.items()}
    assert noted == {2: {"loss": 1.0}, 6: {"loss": 3.0}}
    assert [saved_steps.damage(path) for path in kept.values()] == [[], []]


@pytest.mark.slow
def test_a_run_outlives_a_failed_save_and_a_damaged_checkpoint(tmp_path, micro_corpus, monkeypatch):
    check_space, fails = RunCheckpoints.check_space, [None, UserError("no room"), None]  # at the start, at step 2

    def failing(self, state):
        error = fails.pop(0) if fails else None
        if error:
            raise error
        check_space(self, state)

    monkeypatch.setattr(RunCheckpoints, "check_space", failing)
    config = dataclasses.replace(LOOP, steps=4, checkpoint_every=2, keep_checkpoints=9)
    assert loop.run(config, tmp_path, {}, say=(said := []).append).finished
    assert "warning: the save of step 2 failed: no room; tried again after 0 s" in said
    assert list(step_folders(tmp_path / "checkpoints")) == [3, 4]
    expected = saved(tmp_path, 4)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "checkpoints" / "4" / "default" / "_METADATA").write_text("")
    assert loop.run(config, tmp_path, {}, say=(said := []).append).finished
    assert "contrast: resuming at step 3" in said and any(
        "checkpoint 4 is damaged: default/_METADATA" in x for x in said
    )
    again = saved(tmp_path, 4)
    assert all(leaf.tobytes() == again[path].tobytes() for path, leaf in expected.items())
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, micro_corpus):
    optimizer = dataclasses.replace(LOOP.optimizer, learning_rate=1e38)
    config = dataclasses.replace(LOOP, optimizer=optimizer)
    with pytest.raises(UserError, match="the loss is nan at step 2, .* lower optimizer.learning_rate"):
        loop.run(config, tmp_path, {}, say=quiet)
    assert not (tmp_path / "model").exists()
