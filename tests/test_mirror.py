"""Work folders at a URL: what a run leaves there, and how another machine goes on from it."""

import pathlib
import random
import shutil
import socket

import fsspec
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.system import mirror as mirrors
from hovle_jax.system.mirror import Mirror
from hovle_jax.training import resumable, saved_steps
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep
from tests.test_saves import assert_is, flip, killed, state_of


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder behind a URL -> (its path, its URL)."""
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirrors, "_held", lambda *_: None)  # one process is several machines here
    return tmp_path / "bucket" / "runs", f"file://{tmp_path}/bucket/runs"


def opened(url):
    """Another machine's local copy, with what lies at the URL."""
    made = Mirror(url)
    made.pull()
    return made


def saved(url, *steps, keep=2):
    """Saves these steps of a run, from what lies at the URL -> the newest step before."""
    mirror = opened(url)
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


def test_a_run_goes_on_from_what_lies_at_the_url(remote):
    path, url = remote
    assert saved(url, 1, 2, 3) is None
    assert saves_at(path) == ["2", "3"]
    assert files_below(path) == files_below(opened(url).folder)
    assert saved(url) == 3
    assert saved(url, 4) == 3
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


def test_a_checkpoint_that_was_not_sent_to_its_end_is_none(remote):
    path, url = remote
    saved(url, 1, 2)
    (path / "run" / "checkpoints" / "2" / "files.json").unlink()
    assert saved(url) == 1
    assert not (path / "run" / "checkpoints" / "2" / "default" / "manifest.ocdbt").exists()


def test_a_checkpoint_that_is_damaged_there_is_passed_over(remote):
    path, url = remote
    saved(url, 1, 2)
    flip(next((path / "run" / "checkpoints" / "2" / "default" / "d").iterdir()), 99)
    assert saved(url, 3) == 1
    assert saves_at(path) == ["1", "2.damaged", "3"]


@pytest.mark.parametrize("sent", [0, 3, 9])
def test_a_kill_while_it_is_sent_leaves_a_checkpoint_and_the_rows_up_to_it(sent, remote, monkeypatch):
    """Killed after so many files."""

    class Killed(BaseException):
        pass

    path, url = remote
    saved(url, 1)
    monkeypatch.setattr(mirrors, "THREADS", 1)
    mirror, left = opened(url), [None] * sent
    send = mirror._send

    def killed(name):
        if not left:
            raise Killed
        left.pop()
        send(name)

    monkeypatch.setattr(mirror, "_send", killed)
    (mirror.folder / "run" / "metrics.jsonl").write_text("row\n" * 2)
    shutil.copytree(mirror.folder / "run" / "checkpoints" / "1", mirror.folder / "run" / "checkpoints" / "2")
    with pytest.raises(Killed):
        mirror.push()
    newest = saved(url)
    assert newest == 1
    assert (path / "run" / "metrics.jsonl").read_text() == "row\n" * (2 if sent else 1)
    assert saved(url, 5) == newest


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The URL of a folder on a server of Google Cloud Storage, in this process."""
    server = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    with server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        yield "gs://bucket/runs"


@pytest.mark.slow
def test_a_bucket_takes_20_kills(bucket, tmp_path):
    survives_kills(bucket, 20, tmp_path)


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
    newest = saved_steps.newest_whole(folder / "checkpoints", print)
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
    assert fsspec.filesystem("memory").find("/bucket/runs") == []
    assert pathlib.Path(made.folder).parent.name == "workdirs"
