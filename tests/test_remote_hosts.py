"""Several hosts, as processes, that work on one folder at a URL: what is there is what a shared folder would have."""

import time

import pytest

from hovle_jax.data.bad_samples import read_bad_samples
from hovle_jax.system.remote import Remote
from hovle_jax.training import saved_steps
from tests.jobs import WITHIN, run_of
from tests.test_distributed import MESH, assert_same_run, half_broken, run_alone  # noqa: F401

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """-> (the run's folder behind the URL, the URL of the work folder)."""
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket"


def test_hosts_train_at_a_url_what_one_does_in_a_folder(place, tmp_path, half_broken, start_hosts, monkeypatch):  # noqa: F811
    """Two of them, stopped, then four: each with a copy of its own, and bad samples on all of them."""
    folder, url = place
    settings = dict(mesh=MESH, steps=6, checkpoint_every=2, bad_ceiling=1.0)
    alone = tmp_path / "alone"
    run_alone(run_of(alone, corpora={"0": str(half_broken)}, **settings), alone, monkeypatch)
    for hosts, more in ((2, {"stop_at_step": 3}), (4, {})):
        corpora = dict.fromkeys("0123", str(half_broken))
        run = run_of(folder, corpora=corpora, **settings, **more) | {"url": url}
        job = start_hosts(str(hosts), hosts, 8 // hosts, [run])
        assert job.statuses(WITHIN) == [0] * hosts, job.err(0)
    assert "resuming at step 3" in job.out(0)
    assert_same_run(folder, alone)
    samples = lambda folder: [(event.step, event.sample, event.replaced_by) for event in read_bad_samples(folder)]
    assert samples(folder) == samples(alone) and len(samples(folder)) > 3
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    kept = saved_steps.step_folders(folder / "checkpoints")
    assert list(kept) == [4, 6] and [saved_steps.damage(path) for path in kept.values()] == [[], []]


def test_hosts_that_are_killed_at_a_url_go_on_from_there(place, tmp_path, start_hosts, monkeypatch):
    """Killed again and again while they save; then the newest checkpoint is damaged."""
    folder, url = place
    settings = dict(stage="pretrain", mesh=MESH, steps=40, checkpoint_every=1, keep_checkpoints=4)
    alone, reached = tmp_path / "alone", 0
    run_alone(run_of(alone, **settings), alone, monkeypatch)
    for kill in range(3):
        job = start_hosts(str(kill), 2, 4, [run_of(folder, **settings) | {"url": url}])
        job.until(f" {reached + 5}/40 ")
        time.sleep(0.05 * kill)
        for process in job.processes:
            process.kill()
        job.statuses(WITHIN)
        steps = saved_steps.step_folders(folder / "checkpoints")
        newest = max(step for step, path in steps.items() if not saved_steps.damage(path))
        assert newest >= reached + 3  # two may be on their way
        reached = newest
    newest = folder / "checkpoints" / str(reached)
    next((newest / "default").rglob("d/*")).write_bytes(b"")
    job = start_hosts("last", 2, 4, [run_of(folder, **settings) | {"url": url}])
    assert job.statuses(WITHIN) == [0, 0], job.err(0)
    assert f"checkpoint {reached} is damaged" in job.out(0)
    assert (folder / "checkpoints" / f"{reached}.damaged").exists()
    assert_same_run(folder, alone)


def test_hosts_write_into_a_bucket_together(bucket, tmp_path, start_hosts, monkeypatch):
    """Killed while they save, and gone on from there; the model is written there too."""
    settings = dict(stage="pretrain", mesh=MESH, steps=10, checkpoint_every=1)
    alone, copy = tmp_path / "alone", tmp_path / "copy"
    run_alone(run_of(alone, **settings), alone, monkeypatch)
    job = start_hosts("killed", 2, 4, [run_of(tmp_path / "run", **settings) | {"url": bucket}])
    job.until(" 5/10 ")
    for process in job.processes:
        process.kill()
    job.statuses(WITHIN)
    job = start_hosts("last", 2, 4, [run_of(tmp_path / "run", **settings) | {"url": bucket}])
    assert job.statuses(WITHIN) == [0, 0], job.err(0)
    assert "pretrain: resuming at step " in job.out(0)
    remote = Remote(bucket).below("run")
    remote.take(copy, remote.entries())
    assert_same_run(copy, alone)
    assert {path.name for path in copy.iterdir()} == {path.name for path in alone.iterdir()}
    kept = saved_steps.step_folders(copy / "checkpoints")
    assert list(kept) == [9, 10] and [saved_steps.damage(path) for path in kept.values()] == [[], []]


def test_a_url_that_hosts_cannot_write_to_together_ends_all_of_them(place, tmp_path, start_hosts):
    """Orbax cannot write there, so no host begins."""
    folder, url = place
    job = start_hosts("job", 2, 4, [run_of(folder) | {"url": "memory://runs"}])
    assert job.statuses(WITHIN) == [2, 2]
    for host in range(2):
        assert "several hosts write one checkpoint together, and memory://runs is not gs://" in job.err(host)
