"""The lock on a run's folder, with processes."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from hovle_jax.errors import UserError
from hovle_jax.system import lock

ROOT = pathlib.Path(__file__).parents[1]
# Holds the lock until it is killed, or its standard input ends.
HOLDER = """
import sys
from hovle_jax.system.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def named(folder):
    return json.loads((folder / lock.FILE_NAME).read_text())


def test_a_second_run_is_told_who_has_the_folder_until_the_first_one_ends(tmp_path, holder):
    message = rf"is in use by process {holder.pid} on {os.uname().nodename} \(since 20.*choose another folder"
    with pytest.raises(UserError, match=message), lock.locked(tmp_path):
        pass
    holder.communicate("")
    with lock.locked(tmp_path, say=pytest.fail):
        assert named(tmp_path)["pid"] == os.getpid()
    assert (tmp_path / lock.FILE_NAME).read_bytes() == b""


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert named(tmp_path)["pid"] == holder.pid
    with lock.locked(tmp_path, say=pytest.fail):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)


def elsewhere(beat):
    named = {"host": "vm-9", "pid": 1, "time": "then", "token": "t", "process": "p", "beat": beat}
    return json.dumps(named).ljust(lock.LINE_BYTES)


def test_a_name_from_another_machine_counts_while_its_count_goes_up(tmp_path, quick):
    """As on a mounted bucket, where flock holds on one machine alone."""
    path, ended = tmp_path / lock.FILE_NAME, threading.Event()

    def beat():
        count = 0
        while not ended.wait(0.02):
            with path.open("r+") as file:
                file.write(elsewhere(count := count + 1))

    path.write_text(elsewhere(0))
    other = threading.Thread(target=beat)
    other.start()
    said = []
    with pytest.raises(UserError, match=r"is in use by process 1 on vm-9 \(since then\)"):
        with lock.locked(tmp_path, said.append):
            pass
    ended.set()
    other.join()
    assert len(said) == 1 and "process 1 on vm-9 (since then): waiting" in said[0]
    said.clear()
    with lock.locked(tmp_path, said.append):  # it stands still now
        assert named(tmp_path)["pid"] == os.getpid()
    assert len(said) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_half_a_name_is_none(tmp_path, content):
    (tmp_path / lock.FILE_NAME).write_text(content)
    with lock.locked(tmp_path, say=pytest.fail):
        pass


def test_a_process_whose_place_was_taken_while_it_was_frozen_gives_way(tmp_path, quick, monkeypatch):
    gave = []
    monkeypatch.setattr(lock, "_give_way", lambda path, holder: gave.append(holder["host"]))
    with lock.locked(tmp_path):
        (tmp_path / lock.FILE_NAME).write_text(elsewhere(3))
        end = time.monotonic() + 60
        while not gave:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert gave[0] == "vm-9"
