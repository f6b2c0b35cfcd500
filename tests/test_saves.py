"""Checkpoints and finished models: what is damaged is seen and passed over; a save that fails is tried again."""

import errno
import os
import pathlib
import random
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hovle_jax import checkpoints
from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.training import resumable, saved_steps
from hovle_jax.training.check_numbers import check_numbers
from hovle_jax.training.held_out import check_keep_best
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep, LocalSteps
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import TrainState
from hovle_jax.training.weights import save_result
from tests import forked, micro
from tests.test_commands import ROOT, environment

SIDE = 40


def state_of(step):
    """A small state that no other step has."""
    values = np.random.default_rng(step).normal(size=(2, SIDE, SIDE)).astype(np.float32)
    return TrainState(jnp.int32(step), {"a": {"kernel": jnp.asarray(values[0])}}, {}, [jnp.asarray(values[1])])


def save(folder, *steps, keep=2, said=None):
    """Saves these steps -> the folder of the checkpoints."""
    with RunCheckpoints(folder, keep if isinstance(keep, Keep) else Keep(keep), (said or []).append) as saved:
        for step in steps:
            saved.save(step, state_of(step))
        saved.finish(steps[-1], state_of(steps[-1]))
    return folder / "checkpoints"


def restored(folder, said=None):
    """-> (the step that a run would go on from, its state)."""
    with RunCheckpoints(folder, Keep(2), [].append if said is None else said.append) as saved:
        return saved.latest, saved.restore(state_of(0))


def assert_is(state, step):
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run's folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, 2)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a finished model."""
    return micro.finished_run(tmp_path_factory.mktemp("finished"))


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE = {
    "missing": pathlib.Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "first bit": lambda path: flip(path, 0),
    "a bit": lambda path: flip(path, 8 * (path.stat().st_size // 2) + 5),
    "last bit": lambda path: flip(path, 8 * path.stat().st_size - 1),
}


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_state_comes_back(two_steps):
    step, state = restored(two_steps)
    assert step == 2
    assert_is(state, 2)


def test_devices_hold_one_state_while_another_is_restored_in_its_place(two_steps):
    state = state_of(0)
    with RunCheckpoints(two_steps, Keep(2), [].append) as saved:
        found = saved.restore(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert_is(found, 2)


def test_a_checkpoint_as_older_versions_wrote_it_comes_back(tmp_path):
    """With compressed arrays, their shardings and what each process wrote, in one file each."""
    state = state_of(7)
    changing = {"step": state.step, "trained": state.trained, "opt_state": state.opt_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoints" / "7" / saved_steps.ARRAYS, changing)
    assert (tmp_path / "checkpoints" / "7" / saved_steps.ARRAYS / "_sharding").exists()
    file_lists.write_list(tmp_path / "checkpoints" / "7", {"step": 7})
    step, state = restored(tmp_path)
    assert step == 7
    assert_is(state, 7)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_of_the_newest_checkpoint_is_seen(kind, two_steps, tmp_path):
    names = files_below(two_steps / "checkpoints" / "2")
    assert len(names) > 9 and pathlib.Path("files.json") in names
    for number, name in enumerate(names):
        folder, said = tmp_path / str(number), []
        shutil.copytree(two_steps / "checkpoints", folder)
        DAMAGE[kind](folder / "2" / name)
        assert LocalSteps(folder).newest_whole(said.append) == 1, name
        (line,) = said
        assert line.startswith("warning: checkpoint 2 is damaged: ") and name.name in line and "2.damaged" in line
        assert {path.name for path in folder.iterdir()} == {"1", "2.damaged"}


@pytest.mark.parametrize("kind", ["missing", "half", "a bit"])
def test_damage_to_any_file_of_a_component_is_refused(kind, model, tmp_path):
    config = checkpoints.load_model_config(model)
    abstract = checkpoints.abstract_component(config, "llm", micro.run(micro.run_config("instruct")).placement)
    checkpoints.load_component(model, "llm", abstract)
    names = [name for name in files_below(model / "model") if name.parts[0] in ("llm", "config.json")]
    assert len(names) > 9
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(model, folder)
        DAMAGE[kind](folder / "model" / name)
        with pytest.raises(UserError, match=f"{name.name}.*remove the folder model there.*import it again"):
            checkpoints.load_component(folder, "llm", abstract)


def test_a_damaged_list_of_a_model_is_refused(model, tmp_path):
    for number, kind in enumerate(set(DAMAGE) - {"missing"}):  # without one, it is the model of an older version
        shutil.copytree(model, tmp_path / str(number))
        DAMAGE[kind](tmp_path / str(number) / "model" / "files.json")
        with pytest.raises(UserError, match="files.json is (damaged|cut short|empty).*remove the folder model"):
            checkpoints.check_component(tmp_path / str(number), "llm")


def test_a_damaged_checkpoint_is_passed_over_and_kept(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flip(next((tmp_path / "checkpoints" / "2" / "default" / "d").iterdir()), 77)
    step, state = restored(tmp_path, said := [])
    assert step == 1 and len(said) == 1
    assert_is(state, 1)
    save(tmp_path, 2, 3)  # what was damaged is made again, and can be damaged again
    flip(tmp_path / "checkpoints" / "2" / "files.json", 77)
    flip(tmp_path / "checkpoints" / "3" / "files.json", 77)
    with pytest.raises(UserError, match="2.damaged, 2.damaged.2, 3.damaged; bring one back .* or remove .*checkpoints"):
        restored(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):  # and does not begin again in silence
        restored(tmp_path)


def test_what_a_killed_save_leaves_is_no_checkpoint(two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps / "checkpoints", folder)
    for name in ("99/default", "7.partial/default", "8.deleting", "9.orbax-checkpoint-tmp"):
        (folder / name).mkdir(parents=True)
    assert LocalSteps(folder).newest_whole((said := []).append) == 2
    assert len(said) == 1 and "99 is empty" in said[0]
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_a_checkpoint_of_an_older_version_has_no_list(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "2"
    (newest / "files.json").rename(newest / saved_steps.COMMITTED)
    step, state = restored(tmp_path)
    assert step == 2
    assert_is(state, 2)
    (newest / "default" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="a checkpoint is damaged .*2.damaged, and the same command goes on"):
        restored(tmp_path)
    assert restored(tmp_path)[0] == 1


def test_a_whole_checkpoint_of_another_tree_is_no_damage(two_steps):
    with RunCheckpoints(two_steps, Keep(2)) as saved, pytest.raises(UserError, match="is whole and cannot be restored"):
        saved.restore(TrainState(jnp.int32(0), {"b": jnp.zeros(3)}, {}, []))
    assert (two_steps / "checkpoints" / "2").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def killed(place, folder, after):
    """What a process of `saving_host` has said that was killed so many seconds after its second save: [words]."""
    out, err = folder / "out", folder / "err"
    out.write_text("")
    process = forked.Process("tests.saving_host", [place], ROOT, environment(), out, err)
    patience = time.monotonic() + 300
    while out.read_text().count("saved") < 3 and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.005)
    time.sleep(after)
    process.kill()
    process.wait(timeout=120)
    said = [line.split() for line in out.read_text().splitlines() if line.startswith(("from ", "saved "))]
    assert len(said) > 3, err.read_text()
    return said


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_leaves_the_one_before(kills, tmp_path):
    """Killed at random moments of one save after another, each time in the folder that the kill before left."""
    drawn, cut, run = random.Random(kills), 0, tmp_path / "run"
    for _ in range(kills):
        complete = int(killed(run, tmp_path, drawn.random() * 0.1)[-1][1])
        cut += any((run / "checkpoints").glob("*.partial"))
        newest = LocalSteps(run / "checkpoints").newest_whole((lines := []).append)
        assert complete <= newest <= complete + 2 and not lines  # it was killed before it could say so
    assert cut > kills // 3 or kills < 10
    step, state = restored(run)
    assert_is(state, step)


# ---------------------------------------------------------------------------------------------------------------------
# Saves that fail


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(resumable, "TRY_AGAIN_AFTER", (0.0, 0.0, 0.0))


def failing(monkeypatch, times, error=OSError(errno.ENOSPC, "full")):
    """Makes the next saves fail at their end."""
    left, commit = [error] * times, LocalSteps.commit

    def failing_commit(*arguments):
        if left:
            raise left.pop()
        commit(*arguments)

    monkeypatch.setattr(LocalSteps, "commit", failing_commit)


def steps_of(folder, said, steps, every):
    """A run's saves: what `training.loop` does between its steps."""
    with RunCheckpoints(folder, Keep(9), said.append) as saved:
        for step in range(1, steps + 1):
            if saved._saving:
                saved._saving[1].exception()  # each step takes longer than a save
            if step % every == 0 or saved.due_again():
                saved.save(step, state_of(step))
        saved.finish(steps, state_of(steps))
    return list(saved_steps.step_folders(folder / "checkpoints"))


def test_a_failed_save_is_noticed_at_the_next_step_and_tried_again(tmp_path, monkeypatch, impatient):
    failing(monkeypatch, times=2)
    assert steps_of(tmp_path, said := [], steps=9, every=4) == [6, 8, 9]
    assert [line.split(":")[1:3] for line in said] == [
        [f" the save of step {step} failed", " the disk is full; tried again after 0 s"] for step in (4, 5)
    ]
    assert_is(restored(tmp_path)[1], 9)


def test_saves_that_go_on_failing_end_the_run_with_the_reason(tmp_path, monkeypatch, impatient):
    failing(monkeypatch, times=9)
    with pytest.raises(UserError, match="the disk is full .tried 4 times, last at step 5.*from the beginning"):
        steps_of(tmp_path, said := [], steps=9, every=2)
    assert len(said) == 3 and not list((tmp_path / "checkpoints").iterdir())


def test_the_last_save_is_tried_again_too(tmp_path, monkeypatch, impatient):
    failing(monkeypatch, times=3)
    assert steps_of(tmp_path, said := [], steps=2, every=2) == [2] and len(said) == 3


def test_a_folder_that_is_gone_ends_the_run(tmp_path, impatient):
    with RunCheckpoints(tmp_path, Keep(2), [].append) as saved:
        saved.save(1, state_of(1))
        saved.finish(1, state_of(1))
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(UserError, match="No such file or directory"):
            saved.finish(2, state_of(2))


def test_room_is_asked_for_before_a_save(tmp_path, monkeypatch, impatient):
    usage = shutil.disk_usage(tmp_path)
    with RunCheckpoints(tmp_path, Keep(2), [].append) as saved:
        saved.check_space(state_of(1))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        message = r"takes 1.28e-05 GB and .*checkpoints has 1e-06 GB left; make room"
        with pytest.raises(UserError, match=message):
            saved.check_space(state_of(1))
        with pytest.raises(UserError, match=message):
            saved.finish(1, state_of(1))


def test_a_limit_to_the_size_of_files_is_named(tmp_path, impatient):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunCheckpoints(tmp_path, Keep(2), [].append) as saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(UserError, match="File too large"):
                saved.finish(1, state_of(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saved._failures = 0
        saved.finish(1, state_of(1))
    assert_is(restored(tmp_path)[1], 1)


def test_a_model_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    config = micro.run_config("contrast")
    (tmp_path / "model.partial").touch()  # a file where a folder is needed
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(
        UserError, match="cannot write .*/model: Not a directory; .* goes on from the newest checkpoint"
    ):
        save_result(tmp_path, STAGES["contrast"], micro.params(config), config)


# ---------------------------------------------------------------------------------------------------------------------
# Which stay


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(1), {5}),
        (Keep(2), {4, 5}),
        (Keep(9), {1, 2, 3, 4, 5}),
        (Keep(1, every=2), {2, 4, 5}),
        (Keep(1, best="loss"), {3, 5}),
        (Keep(1, best="max:loss"), {1, 5}),
        (Keep(1, best="other"), {5}),
    ],
)
def test_what_stays(keep, stay):
    losses = {1: 3.0, 2: float("nan"), 3: 1.0, 4: 1.0}
    assert keep.stay({step: {"loss": losses[step]} if step in losses else {} for step in range(1, 6)}) == stay


def test_the_best_stays_over_several_processes(tmp_path):
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], 1):
        with RunCheckpoints(tmp_path, Keep(1, best="loss"), [].append) as saved:
            saved.save(step, state_of(step), {"loss": loss})
            saved.finish(step, state_of(step))
    assert list(saved_steps.step_folders(tmp_path / "checkpoints")) == [2, 4]
    assert saved_steps.note_of(tmp_path / "checkpoints" / "2")["held_out"] == {"loss": 1.0}


def test_the_metric_of_the_best_must_be_there():
    for every, message in ((0, "eval_every=0 must divide checkpoint_every=4"), (3, "eval_every=3 must divide")):
        with pytest.raises(UserError, match=message):
            check_numbers(micro.run_config("distill", keep_best="loss", checkpoint_every=4, eval_every=every))
    check_numbers(micro.run_config("distill", keep_best="loss", checkpoint_every=4, eval_every=2))
    check_keep_best("", None)
    check_keep_best("max:image_cosine", ["loss", "image_cosine"])
    with pytest.raises(UserError, match="keep_best='max:accuracy' is no held-out metric of this run, which has loss"):
        check_keep_best("max:accuracy", ["loss"])
    with pytest.raises(UserError, match="no held-out rows; name some with data.held_out"):
        check_keep_best("loss", None)


# ---------------------------------------------------------------------------------------------------------------------
# Lists of files


def test_flipped_bits_are_all_seen(tmp_path):
    """A hundred places of a file and of its list."""
    (tmp_path / "array").write_bytes(np.random.default_rng(0).bytes(3000))
    file_lists.write_list(tmp_path, {"step": 3})
    assert file_lists.damage(tmp_path) == [] and file_lists.read_list(tmp_path)[1] == {"step": 3}
    drawn = random.Random(0)
    for name in ("array", "files.json"):
        for _ in range(100):
            bit = drawn.randrange(8 * (tmp_path / name).stat().st_size)
            flip(tmp_path / name, bit)
            assert len(file_lists.damage(tmp_path)) == 1, (name, bit)
            flip(tmp_path / name, bit)
    assert file_lists.damage(tmp_path) == []


def test_a_folder_without_a_list_is_not_compared(tmp_path):
    (tmp_path / "file").touch()
    assert file_lists.damage(tmp_path) == [] and file_lists.read_list(tmp_path) is None
