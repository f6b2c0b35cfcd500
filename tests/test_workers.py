"""Rows made by processes: the same ones, whatever happens to a process, and no process that outlives its parent."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from hovle_jax.data.workers import made_by_processes
from hovle_jax.errors import UserError
from hovle_jax.system.processes import how_it_ended, state_of

COUNT = 12


def rows_where(happens, *once):
    """rows[k] is k * k; `happens(k)` before that, of row 5, only once where a file is given that marks it."""

    class Rows:  # of a function, so that it is sent by value
        def __getitem__(self, index):
            import pathlib

            if index == 5 and not any(pathlib.Path(path).exists() for path in once):
                for path in once:
                    pathlib.Path(path).touch()
                happens(index)
            return index * index

    return Rows()


def made(rows, timeout=0.0):
    making = made_by_processes(rows, 2, 2, 4, timeout)
    try:
        return [next(making) for _ in range(COUNT)]
    finally:
        making.close()


def die(index):
    import os

    os.kill(os.getpid(), 9)


def freeze(index):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    "happens, timeout, said",
    [
        pytest.param(die, 0.0, r"was killed by signal 9 \(SIGKILL\): out of memory\?", id="killed"),
        pytest.param(
            freeze, 15.0, r"has not made a row for 15 seconds and is stopped", id="frozen", marks=pytest.mark.slow
        ),
    ],
)
def test_a_process_that_dies_or_hangs_is_started_again(happens, timeout, said, tmp_path, capfd):
    rows = rows_where(happens, str(tmp_path / "happened"))
    assert made(rows, timeout) == [k * k for k in range(2, 2 + COUNT)]
    line, *_ = [line for line in capfd.readouterr().err.splitlines() if "data worker" in line]
    assert re.search(rf"data worker 1 \(process \d+\) {said}; it is started again and makes the same rows", line), line


@pytest.mark.slow
def test_a_row_that_always_kills_its_process_is_named(capfd):
    with pytest.raises(UserError, match=r"signal 9 .*, 3 times at the same rows \(from row 5 of this host's\)"):
        made(rows_where(die))
    assert capfd.readouterr().err.count("started again") == 2


def test_what_a_row_raises_is_raised_here():
    def refuse(index):
        from hovle_jax.errors import UserError

        raise UserError(f"row {index} is wrong")

    def fail(index):
        raise KeyError("of the code")

    with pytest.raises(UserError, match="row 5 is wrong"):
        made(rows_where(refuse))
    with pytest.raises(RuntimeError, match="a data worker failed:.*KeyError: 'of the code'".replace(".", "(?s:.)", 1)):
        made(rows_where(fail))


def gone(pid):
    return state_of(pid) in ("ended", "unknown")


def wait_until_gone(pids):
    end = time.monotonic() + 10
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if not gone(pid)]


def test_processes_end_with_the_iterator():
    import multiprocessing

    making = made_by_processes(list(range(100)), 0, 2, 4)
    assert next(making) == 0
    pids = [child.pid for child in multiprocessing.active_children() if child.name.startswith("data worker")]
    assert len(pids) == 2 and not any(map(gone, pids))
    making.close()
    assert not wait_until_gone(pids)


PARENT = """
import multiprocessing, time
from hovle_jax.data.workers import made_by_processes
making = made_by_processes(list(range(100)), 0, 2, 4)
assert [next(making) for _ in range(2)] == [0, 1]
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_no_process_outlives_a_parent_that_was_killed():
    """A stopped one neither, which no pipe would wake."""
    root = pathlib.Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and not any(map(gone, pids))
        os.kill(pids[0], signal.SIGSTOP)
        parent.kill()
    assert wait_until_gone(pids) == []


@pytest.mark.parametrize("code, words", [
    (-9, "killed by signal 9 (SIGKILL): out of memory?"), (-11, "killed by signal 11 (SIGSEGV)"),
    (3, "ended with status 3"), (-99, "killed by signal 99 (unknown)"), (None, "cut off"),
])  # fmt: skip
def test_how_a_process_ended_is_said_in_words(code, words):
    assert how_it_ended(code) == words


@pytest.mark.slow
def test_a_run_s_batches_are_the_same_though_a_process_is_killed(tmp_path, monkeypatch):
    import multiprocessing

    from hovle_jax.corpora import loading
    from hovle_jax.data import pipeline
    from hovle_jax.training.stages import STAGES
    from tests import broken, micro

    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    path, _ = broken.write_jsonl(tmp_path, good=40)
    data = dict(source=str(path), batch_size=4, sequence_length=192, tiles=5, max_tiles=4, augment=True)
    config = micro.run_config("instruct", data=data, bad_ceiling=1.0)
    corpus = loading.load_corpus(config, "train", lambda line: None)
    dataset = pipeline.build_dataset(config, STAGES["instruct"].batch, micro.tokenizer(), corpus)
    making = dataset.iterate(1, workers=2)
    for step in range(1, 12):
        (batch, *rest), (expected, *as_threads) = next(making), next(dataset.iterate(step))
        assert all((batch[name] == expected[name]).all() for name in expected) and rest == as_threads
        if step in (3, 7):
            child = next(c for c in multiprocessing.active_children() if c.name == "data worker 1")
            os.kill(child.pid, signal.SIGKILL)
    making.close()
