"""Work folders at a URL: what a run leaves there, and how another machine goes on from it."""

import hashlib
import pathlib
import random
import shutil

import fsspec
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system import mirror as mirrors
from hovle_jax.system import remote as remotes
from hovle_jax.system.mirror import Mirror
from hovle_jax.training import resumable, saved_steps
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep, LocalSteps
from tests.test_saves import assert_is, flip, killed, state_of


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder behind a URL -> (its path, its URL)."""
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirrors, "_held", lambda *_: None)  # one process is several machines here
    return tmp_path / "bucket" / "runs", f"file://{tmp_path}/bucket/runs"


@pytest.fixture(params=["one host", "several"])
def shared(request):
    """Whether checkpoints are written straight to the URL, as several hosts do."""
    return request.param == "several"


def opened(url, shared=False):
    """Another machine's local copy, with what lies at the URL."""
    made = Mirror(url, shared)
    made.pull()
    return made


def saved(url, *steps, keep=2, shared=False):
    """Saves these steps of a run, from what lies at the URL -> the newest step before."""
    mirror = opened(url, shared)
    (mirror.folder / "run").mkdir(exist_ok=True)
    with RunCheckpoints(mirror.folder / "run", Keep(keep), [].append, mirror) as checkpoints:
        before = checkpoints.latest
        for step in steps:
            (mirror.folder / "run" / "metrics.jsonl").write_text("row\n" * step)
            checkpoints.save(step, state_of(step))
        if steps:
            checkpoints.finish(steps[-1], state_of(steps[-1]))
        elif before is not None:
            assert_is(checkpoints.restore(state_of(0)), before)
    return before


def files_below(folder):
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix(): content for path, content in found.items()}


def saves_at(path):
    """Names of the checkpoints there; without files a folder is nothing in a bucket."""
    return sorted(inner.name for inner in (path / "run" / "checkpoints").iterdir() if files_below(inner))


def test_a_run_goes_on_from_what_lies_at_the_url(remote, shared):
    path, url = remote
    assert saved(url, 1, 2, 3, shared=shared) is None
    assert saves_at(path) == ["2", "3"]
    there = files_below(path)
    assert there.pop(".signed_by") and there == files_below(opened(url).folder)
    assert saved(url, shared=shared) == 3
    assert saved(url, 4, shared=shared) == 3
    assert not (opened(url, shared=True).folder / "run" / "checkpoints").exists()
    assert saves_at(path) == ["3", "4"]
    assert (path / "run" / "metrics.jsonl").read_text() == "row\n" * 4


def test_a_save_that_cannot_be_sent_is_tried_again(remote, monkeypatch):
    path, url = remote
    mirror, fails = opened(url), [UserError("no network")] * 2
    push = mirror.push

    def failing():
        if fails:
            raise fails.pop()
        push()

    monkeypatch.setattr(mirror, "push", failing)
    monkeypatch.setattr(resumable, "TRY_AGAIN_AFTER", (0.0, 0.0))
    (mirror.folder / "run").mkdir()
    with RunCheckpoints(mirror.folder / "run", Keep(2), (said := []).append, mirror) as checkpoints:
        checkpoints.finish(1, state_of(1))
    assert len(said) == 2 and "the save of step 1 failed: no network" in said[0] and saves_at(path) == ["1"]
    assert saved(url) == 1


def test_what_is_only_in_the_local_copy_is_forgotten(remote):
    """It is newer than what was sent: metrics and checkpoints would not fit together."""
    _, url = remote
    saved(url, 1)
    local = opened(url).folder / "run"
    (local / "metrics.jsonl").write_text("row\n" * 9)
    shutil.copytree(local / "checkpoints" / "1", local / "checkpoints" / "9")
    assert saved(url) == 1
    assert (local / "metrics.jsonl").read_text() == "row\n"


def test_a_checkpoint_that_was_not_sent_to_its_end_is_none(remote, shared):
    path, url = remote
    saved(url, 1, 2, shared=shared)
    (path / "run" / "checkpoints" / "2" / "files.json").unlink()
    assert saved(url, shared=shared) == 1
    assert not (path / "run" / "checkpoints" / "2" / "default" / "manifest.ocdbt").exists()


def test_a_checkpoint_that_is_damaged_there_is_passed_over(remote, shared):
    path, url = remote
    saved(url, 1, 2, shared=shared)
    flip(next((path / "run" / "checkpoints" / "2" / "default" / "d").iterdir()), 99)
    assert saved(url, 3, shared=shared) == 1
    assert saves_at(path) == ["1", "2.damaged", "3"]
    flip(path / "run" / "checkpoints" / "3" / "files.json", 99)
    assert saved(url, 3, shared=shared) == 1  # what was damaged is made again, and is damaged again
    (path / "run" / "checkpoints" / "3" / "default" / "manifest.ocdbt").unlink()
    assert saved(url, 4, shared=shared) == 1
    assert saves_at(path) == ["1", "2.damaged", "3.damaged", "3.damaged.2", "4"]
    for step in "14":
        shutil.rmtree(path / "run" / "checkpoints" / step)
    with pytest.raises(UserError, match="no checkpoint in .* is whole: 2.damaged, 3.damaged, 3.damaged.2; bring one"):
        saved(url, shared=shared)


def test_held_out_metrics_of_a_checkpoint_are_noted_at_the_url(remote, shared):
    path, url = remote
    mirror = opened(url, shared)
    (mirror.folder / "run").mkdir()
    with RunCheckpoints(mirror.folder / "run", Keep(1, best="loss"), [].append, mirror) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
            checkpoints.save(step, state_of(step), {"loss": loss})
        checkpoints.finish(4, state_of(4))
        checkpoints.held_out(4, {"loss": 5.0})
    mirror.push()
    assert saves_at(path) == ["2", "4"]
    assert saved_steps.note_of(path / "run" / "checkpoints" / "4")["held_out"] == {"loss": 5.0}
    assert saved_steps.damage(path / "run" / "checkpoints" / "4") == []


def test_a_list_may_have_the_md5_that_a_service_keeps(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    files = {"a": {"bytes": 7, "md5": hashlib.md5(b"content").hexdigest()}}
    (tmp_path / "files.json").write_text(file_lists.text_of(files, {}))
    assert file_lists.damage(tmp_path) == []
    flip(tmp_path / "a", 9)
    assert file_lists.damage(tmp_path) == ["a is not what was written (its md5 differs)"]


def test_hosts_take_what_others_have_sent(remote, tmp_path, monkeypatch):
    """Each has a copy of its own; the first one's removals count, and no host loses what it has written itself."""
    path, url = remote
    path.mkdir(parents=True)
    (path / "bad.host_1").write_text("of an earlier process")
    first = opened(url, shared=True)
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache of host 1"))
    second = Mirror(url, shared=True, leads=False)
    second.pull()
    assert (second.folder / "bad.host_1").exists() and first.folder != second.folder
    (first.folder / "bad.host_1").unlink()
    (first.folder / "rows").write_text("1")
    first.push()
    second.take_new()
    assert files_below(second.folder) == {"rows": b"1"}
    (second.folder / "bad.host_1").write_text("new")
    second.push()
    (second.folder / "bad.host_1").write_text("new, and more")
    first.take_new()
    second.take_new()
    assert files_below(first.folder) == {"rows": b"1", "bad.host_1": b"new"}
    assert files_below(second.folder) == {"rows": b"1", "bad.host_1": b"new, and more"}
    second.push()
    first.take_new()
    assert (first.folder / "bad.host_1").read_text() == "new, and more"


def test_a_run_that_has_begun_later_ends_the_one_before(remote, shared):
    path, url = remote
    older = opened(url, shared)
    (older.folder / "run").mkdir()
    with RunCheckpoints(older.folder / "run", Keep(2), [].append, older) as checkpoints:
        checkpoints.finish(1, state_of(1))
        assert saved(url, 2, shared=shared) == 1
        (older.folder / "run" / "metrics.jsonl").write_text("of the older run")
        with pytest.raises(UserError, match="another run works on file://.*process .* started .* --workdir of its own"):
            older.push()
    assert saves_at(path) == ["1", "2"]
    assert (path / "run" / "metrics.jsonl").read_text() == "row\n" * 2
    assert ".signed_by" not in files_below(opened(url).folder)


def test_several_hosts_need_a_url_that_orbax_writes_to(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="memory://runs is not gs://, where they can; give a gs:// URL, or a folder"):
        Mirror("memory://runs", shared=True)


@pytest.mark.parametrize("sent", [0, 3, 9])
def test_a_kill_while_it_is_sent_leaves_a_checkpoint_and_the_rows_up_to_it(sent, remote, monkeypatch):
    """Killed after so many files."""

    class Killed(BaseException):
        pass

    path, url = remote
    saved(url, 1)
    monkeypatch.setattr(remotes, "THREADS", 1)
    mirror, left = opened(url), [None] * sent
    made = mirror.remote._made

    def killed(name):
        if not left:
            raise Killed
        left.pop()
        return made(name)

    monkeypatch.setattr(mirror.remote, "_made", killed)
    (mirror.folder / "run" / "metrics.jsonl").write_text("row\n" * 2)
    shutil.copytree(mirror.folder / "run" / "checkpoints" / "1", mirror.folder / "run" / "checkpoints" / "2")
    with pytest.raises(Killed):
        mirror.push()
    newest = saved(url)
    assert newest == 1
    assert (path / "run" / "metrics.jsonl").read_text() == "row\n" * (2 if sent else 1)
    assert saved(url, 5) == newest


@pytest.mark.slow
def test_a_bucket_takes_20_kills(bucket, tmp_path):
    survives_kills(bucket, 20, tmp_path)


@pytest.mark.slow
def test_checkpoints_of_several_hosts_lie_in_a_bucket(bucket, monkeypatch):
    """Written there by Orbax; compared by the md5 that the service keeps; what is damaged is copied and passed over."""
    monkeypatch.setattr(mirrors, "_held", lambda *_: None)
    assert saved(bucket, 1, 2, 3, shared=True) is None
    remote = Mirror(bucket).remote.below("run/checkpoints")
    listed, note = file_lists.parsed(remote.read("3/files.json"), "")
    assert note["step"] == 3 and len(listed) > 5 and all(file.keys() == {"bytes", "md5"} for file in listed.values())
    assert saved(bucket, 4, shared=True) == 3
    remote.write(next(name for name in remote.entries() if name.startswith("4/default/d/")), b"damaged")
    remote.remove(["3/files.json"])
    with pytest.raises(UserError, match="no checkpoint in gs://.* is whole: 4.damaged"):
        saved(bucket, shared=True)
    assert {name.partition("/")[0] for name in remote.entries()} == {"4.damaged"}


def test_a_folder_at_a_url_takes_kills(remote, tmp_path):
    survives_kills(remote[1], 2, tmp_path)


def survives_kills(url, kills, tmp_path):
    """Each process goes on from a checkpoint that the one before has said, or a later one; no rows are missing."""
    drawn, complete = random.Random(kills), 0
    for _ in range(kills):
        first, *_, last = killed(url, tmp_path, drawn.random() * 0.3)
        assert complete <= int(first[1]) <= complete + 2
        complete = int(last[1])
    folder = opened(url).folder / "run"
    newest = LocalSteps(folder / "checkpoints").newest_whole(print)
    assert newest >= complete >= 2 * kills
    assert len((folder / "rows").read_text().split()) >= newest


def test_what_is_sent_in_which_turn():
    names = ["run/checkpoints/1/files.json", "run/checkpoints/1/default/d/a", "run/metrics.jsonl", "report.html"]
    assert mirrors._in_turns(names) == [names[2:], names[1:2], names[:1]]


def test_a_url_that_cannot_be_used_is_named(remote, monkeypatch):
    with pytest.raises(UserError, match="not a chain"):
        Mirror("simplecache::file:///tmp/x")
    with pytest.raises(UserError, match="nosuch://x cannot be opened"):
        Mirror("nosuch://x")
    path, url = remote
    path.parent.mkdir(parents=True)
    path.touch()  # a file where the folder is needed
    with pytest.raises(UserError, match="cannot be written: .*; check the URL and the credentials"):
        Mirror(url)


def test_two_processes_of_a_machine_do_not_share_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    first = Mirror(f"file://{tmp_path}/runs")
    with pytest.raises(UserError, match="another process of this machine works on file://"):
        Mirror(f"file://{tmp_path}/runs")
    assert first.folder.is_dir()


def test_memory_is_as_good_as_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    made = Mirror("memory://bucket/runs")
    made.pull()
    (made.folder / "a").mkdir()
    (made.folder / "a" / "array.npy").write_bytes(np.zeros(3).tobytes())
    made.push()
    made.pull()
    assert (made.folder / "a" / "array.npy").stat().st_size == 24
    (made.folder / "a" / "array.npy").unlink()
    made.push()
    assert fsspec.filesystem("memory").find("/bucket/runs") == ["/bucket/runs/.signed_by"]
    assert pathlib.Path(made.folder).parent.name == "workdirs"
