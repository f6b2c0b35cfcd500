"""Several hosts, as processes on loopback: the same run as on one, its missing and failing members by name."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from hovle_jax import checkpoints
from hovle_jax.config import MeshConfig
from hovle_jax.corpora import easy_vqa, loading
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import read_bad_samples
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed, preemption, rollcall
from hovle_jax.hosts.rollcall import numbers, roll_call
from hovle_jax.report.metrics import is_measured, read_metrics
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import loop
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.stages import STAGES
from tests import broken, forked, host, kills, micro
from tests.jobs import REPOSITORY, WITHIN, free_port, run_of

# The hosts compile as tests/host.py says; a run in this process must do the same.
pytestmark = pytest.mark.usefixtures("quick_compilation")


# ---------------------------------------------------------------------------------------------------------------------
# The roll-call, in threads


def call_in_threads(calls, hosts, timeout, port=None, delays=(), after=()):
    """{host: its announcement} -> {host: what it was told, '' = all are there}.

    Args:
      delays: {host: seconds that it comes later}.
      after: {host: threads that have ended before it comes}.
    """
    reasons, port = {}, port or free_port()

    def call(index, announcement):
        time.sleep(dict(delays).get(index, 0))
        for thread in dict(after).get(index, ()):
            thread.join()
        try:
            roll_call(announcement, ("127.0.0.1", port), hosts, index, timeout)
            reasons[index] = ""
        except UserError as error:
            reasons[index] = str(error)

    threads = [threading.Thread(target=call, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 20)
    return reasons


def announcements(hosts, **more):
    return {index: {"name": f"vm-{index}", **more} for index in hosts}


def test_all_hosts_start_when_the_last_one_has_come():
    reasons = call_in_threads(announcements(range(6), config={"steps": (1, 2)}), 6, 20, delays={0: 0.5, 4: 1})
    assert reasons == dict.fromkeys(range(6), "")


def test_missing_hosts_are_named_to_those_that_came():
    reasons = call_in_threads(announcements([0, 1, 2, 4, 5, 6]), 9, 2.5)
    assert len(set(reasons.values())) == 1 and len(reasons) == 6
    assert reasons[0].startswith("hosts 3, 7-8 of 9 did not start within 2.5 s; came: 0-2, 4-6; see the logs")
    reasons = call_in_threads(announcements([0, 1]), 3, 2)
    assert reasons[1].startswith("host 2 of 3 did not start within 2 s; came: 0 (vm-0), 1 (vm-1);")


def test_without_host_0_the_others_say_so():
    reasons = call_in_threads(announcements([1]), 2, 1)
    assert "host 0 (127.0.0.1:" in reasons[1] and "did not answer host 1 (vm-1) within 1 s" in reasons[1]


def test_a_host_that_is_not_like_host_0_is_named_with_the_difference():
    calls = announcements(range(4), software={"jax": "0.12.0"}, config={"data": {"batch_size": 8}})
    calls[2]["config"] = {"data": {"batch_size": 16}}
    calls[3]["software"] = {"jax": "0.10.2"}
    reasons = call_in_threads(calls, 4, 20)
    assert len(set(reasons.values())) == 1
    expected = "host 2 (vm-2) (and hosts 3) differs from host 0: config.data.batch_size is 16 there and 8 here"
    assert reasons[1].startswith(expected)
    other_number = call_in_threads({0: {"name": "a"}}, 2, 3)
    assert "host 1 of 2 did not start" in other_number[0]


def test_two_hosts_of_one_index_and_strangers_at_the_port():
    port, reasons = free_port(), {}

    def double():
        try:
            roll_call({"name": "twin"}, ("127.0.0.1", port), 3, 1, 3)
        except UserError as error:
            reasons["twin"] = str(error)

    def stranger():
        time.sleep(0.2)
        calls = [{"host": host, "name": "x", "job": ""} for host in (77, -1, 0, True, 1.5, 1.0, "1", None, [1])]
        nested = [b"[" * 100_000 + b"\n", b'{"a":' * 100_000 + b"\n"]
        lines = [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n", b"", b"1" * 9000 + b"\n", *nested]
        for line in [*lines, *(json.dumps(call).encode() + b"\n" for call in calls)]:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(line)

    others = [threading.Thread(target=stranger), threading.Timer(1.0, double)]
    for thread in others:
        thread.start()
    reasons |= call_in_threads(announcements(range(3)), 3, 60, port, after={2: others})
    assert reasons.pop("twin") == "two hosts call themselves 1: vm-1 and twin; see --host"
    assert reasons == {0: "", 1: "", 2: ""}


def test_a_line_has_one_deadline_however_slowly_it_comes(monkeypatch):
    """A stranger that says a little now and then does not hold up the hosts."""
    monkeypatch.setattr(rollcall, "LINE_SECONDS", 0.3)
    port, done = free_port(), threading.Event()

    def drip():
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line, contextlib.suppress(OSError):
            while not done.wait(0.05):
                line.sendall(b"[")

    stranger = threading.Timer(0.2, drip)
    stranger.start()
    reasons = call_in_threads(announcements(range(2)), 2, 10, port, delays={1: 0.5})
    done.set()
    stranger.join()
    assert reasons == {0: "", 1: ""}


def test_a_host_of_another_job_is_told_and_does_not_count(monkeypatch):
    port, reasons = free_port(), {}

    def other():
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(json.dumps({"host": 1, "hosts": 2, "job": "b", "name": "vm-b"}).encode() + b"\n")
            reasons["other"] = json.loads(line.makefile().readline())["error"]

    monkeypatch.setenv("HOVLE_JOB", "a")
    thread = threading.Thread(target=other)
    thread.start()
    reasons |= call_in_threads(announcements(range(2)), 2, 60, port, after={1: [thread]})
    assert reasons.pop("other").startswith("vm-0 waits for another job: HOVLE_JOB must be the same on all hosts")
    assert reasons == {0: "", 1: ""}


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as server:
        reasons = call_in_threads(announcements([0]), 2, 1, server.getsockname()[1])
    assert "host 0 cannot listen on port" in reasons[0] and "--coordinator" in reasons[0]


def test_numbers_are_short():
    assert numbers({5, 0, 1, 2}) == "0-2, 5" and numbers([7]) == "7" and numbers([]) == ""


@pytest.mark.parametrize("said, message", [
    (dict(hosts=4), "--coordinator and --host must be given too"),
    (dict(coordinator="a:1", hosts=2), "--host must be given too"),
    (dict(coordinator="a:1", hosts=2, host=2), "--host=2 is not one of --hosts=2, which count from 0"),
    (dict(coordinator="a", hosts=2, host=0), "--coordinator='a' is not HOST:PORT"),
])  # fmt: skip
def test_half_of_what_start_must_know_is_an_error(said, message):
    with pytest.raises(UserError, match=message):
        distributed.start(**said)


def test_one_process_needs_nothing():
    distributed.start()
    distributed.start(hosts=1)
    assert not distributed.several() and distributed.is_leader() and not preemption.preempted()
    with distributed.ending_together():
        assert distributed.gather("value", 7) == [7]
    assert distributed.host_rows(Placement(make_mesh(MeshConfig())).batch_sharding, 16) == (tuple(range(16)), True)


def test_a_pod_is_found_and_a_cluster_that_cannot_be_read_is_said(monkeypatch):
    from jax._src.clusters import ClusterEnv

    found = lambda *_: ("10.0.0.1:8482", 4, 2, None)
    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", found)
    assert distributed._detected(300) == ("10.0.0.1:8482", 4, 2, None)
    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: (None, None, None, None))
    assert distributed._detected(300) == ("", 1, 0, None)

    def unreadable(*_):
        raise RuntimeError("Kubernetes API Error: 403")

    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", unreadable)
    with pytest.raises(UserError, match="cannot find its hosts .*403.*--hosts 1 for this machine alone"):
        distributed._detected(300)


# ---------------------------------------------------------------------------------------------------------------------
# Runs, in processes


def run_alone(run, folder, monkeypatch):
    """The same run in this process, on its eight devices."""
    with monkeypatch.context() as patch:
        if "corpora" not in run:
            patch.setattr(loading, "load_corpus", lambda config, split, say=print: micro.corpus())
        if "again" in run:
            patch.setattr(RunCheckpoints, "restore", host.saving_again(run["again"]))
        return loop.run(host.config_of(run), folder, {}, say=lambda line: None)


def parameters(folder):
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))
    config = checkpoints.load_model_config(folder)
    components = [path.name for path in (folder / "model").iterdir() if path.is_dir()]
    return {
        c: checkpoints.load_component(folder, c, checkpoints.abstract_component(config, c, placement))
        for c in components
    }


def metrics_but_times(folder):
    """The rows without what a clock has measured."""
    return [{name: value for name, value in row.items() if not is_measured(name)} for row in read_metrics(folder)]


def assert_same_run(folder, expected):
    rows, expected_rows = metrics_but_times(folder), metrics_but_times(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, other in zip(rows, expected_rows):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *map(parameters, (folder, expected)))


MESH = {"data": 2, "fsdp": 4}


def restored_to_the_bit(run, step, folder):
    """Whether a run that was told to save `again` what it restored had what is in the folder's checkpoint."""
    return kills.unequal_arrays(*(pathlib.Path(f) / "checkpoints" / str(step) for f in (folder, run["again"]))) == []


def test_two_hosts_train_what_one_does_and_either_goes_on_where_the_other_stopped(tmp_path, start_hosts, monkeypatch):
    two, one, ones = (tmp_path / name for name in ("two", "one", "ones"))
    settings = dict(stage="pretrain", mesh=MESH, steps=4, checkpoint_every=2, eval_every=3)
    run_in = lambda folder, number: run_of(folder, **settings) | {"again": str(tmp_path / f"again_{number}")}
    of_two, of_one, by_one = (run_in(folder, number) for number, folder in enumerate((two, ones, two)))
    job = start_hosts("job", 2, 4, [run_of(two, **settings, stop_at_step=2), of_two, of_one | {"after": str(ones)}])
    run_alone(run_of(one, **settings), one, monkeypatch)
    # Two, from the checkpoint that one has written.
    begun = shutil.copytree(one, tmp_path / "begun", ignore=shutil.ignore_patterns("model", "4"))
    begun.rename(ones)
    assert job.statuses(WITHIN) == [0, 0], job.err(0)
    assert_same_run(two, one)
    assert_same_run(ones, one)
    assert restored_to_the_bit(of_two, 2, two) and restored_to_the_bit(of_one, 2, one)
    # Only host 0 speaks, and writes.
    assert job.out(0).count("pretrain: resuming at step 2") == 2 and "pretrain" not in job.out(1)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    # One process, from the checkpoint that two have written.
    shutil.rmtree(two / "model")
    shutil.rmtree(two / "checkpoints" / "4")
    assert run_alone(by_one, two, monkeypatch).finished
    assert_same_run(two, one)
    assert restored_to_the_bit(by_one, 2, two)


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_two_to_four_and_to_one(tmp_path, start_hosts, monkeypatch):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    settings = dict(stage="pretrain", mesh=MESH, steps=8, checkpoint_every=2, keep_checkpoints=9)
    run_alone(run_of(whole, **settings), whole, monkeypatch)
    for step, hosts in ((2, 1), (4, 2), (6, 4), (8, 1)):
        run = run_of(moved, **settings, stop_at_step=step) | {"again": str(tmp_path / f"again_{step}")}
        if hosts == 1:
            run_alone(run, moved, monkeypatch)
        else:
            job = start_hosts(f"job_{step}", hosts, 8 // hosts, [run])
            assert job.statuses(WITHIN) == [0] * hosts, job.err(0)
        assert step == 2 or restored_to_the_bit(run, step - 2, moved)
    assert_same_run(moved, whole)


@pytest.fixture
def half_broken(tmp_path):
    """A jsonl of captioned images that all state their sizes, and of which each third is not there."""
    rows = []
    for i, caption in enumerate(easy_vqa.CAPTIONS):
        rows.append({"image": f"{i}.png", "width": 32, "height": 32, "caption": caption})
        if i % 3:
            (tmp_path / f"{i}.png").write_bytes(broken.encoded(i))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_hosts_that_share_rows_list_each_bad_sample_once(tmp_path, half_broken, start_hosts):
    """Four hosts of two devices: each half of the batch lies on two hosts, as the tensor axis is between them."""
    four, corpora = tmp_path / "four", dict.fromkeys("0123", str(half_broken))
    run = run_of(four, mesh={"data": 2, "tensor": 4}, corpora=corpora, steps=3, bad_ceiling=1.0)
    job = start_hosts("job", 4, 2, [run])
    config = host.config_of(run)
    corpus = loading.load_corpus(config, "train", lambda line: None)
    dataset = pipeline.build_dataset(config, STAGES["contrast"].batch, micro.tokenizer(), corpus)
    drawn = [event for (_, events, _), _ in zip(dataset.iterate(), range(3)) for event in events]
    expected = [(event.sample, event.replaced_by) for event in [*dataset.summary.bad, *drawn]]
    assert len(expected) > 3
    assert job.statuses(WITHIN) == [0, 0, 0, 0], job.err(0)
    assert [row["step"] for row in read_metrics(four)] == [1, 2, 3]
    assert [(event.sample, event.replaced_by) for event in read_bad_samples(four)] == expected
    assert not list(four.glob("bad_samples.host*"))


@pytest.mark.slow
def test_other_data_and_a_failing_host_end_the_run_everywhere(tmp_path, half_broken, start_hosts):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(half_broken.read_text().splitlines(keepends=True)[:-2]))
    differing = run_of(tmp_path / "data", corpora={"0": str(half_broken), "1": str(other)})
    differing = start_hosts("differing", 2, 4, [differing])
    failing = start_hosts("failing", 2, 4, [run_of(tmp_path / "run") | {"fails": {"1": 2}}])
    assert differing.statuses(WITHIN) == [2, 2]
    for index in range(2):
        (line,) = differing.err(index).splitlines()
        assert line.startswith("error: host 1 of 2 and host 0 differ in what they read: data ")
        assert "of 22 samples" in line and "of 24 samples" in line
    assert failing.statuses(WITHIN) == [1, 2]
    assert failing.err(1).splitlines()[-1] == "error: the disk of this host is full"
    assert "stopped: UserError: the disk of this host is full" in failing.err(0)


def test_one_host_that_is_preempted_lets_all_of_them_save(tmp_path, start_hosts):
    job = start_hosts("job", 2, 4, [run_of(tmp_path / "run")])
    job.until(" 2/5000")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.statuses(WITHIN) == [143, 143]
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert job.err(1) == "SIGTERM: saving after this step, then ending; a second signal ends at once, without\n"
    assert last < 5000 and (tmp_path / "run" / "checkpoints" / str(last)).is_dir()


@pytest.mark.parametrize(
    "more, said, heartbeat",
    [
        # Nothing is compiled, so that hosts are quick to come and have time for their heartbeats.
        pytest.param({"waits": {"0": WITHIN, "1": WITHIN}}, "waiting", 12, id="before a step"),
        pytest.param({}, " 2/5000", 40, id="in a step", marks=pytest.mark.slow),
    ],
)
def test_a_host_that_dies_ends_the_others(more, said, heartbeat, tmp_path, start_hosts):
    job = start_hosts("job", 2, 4, [run_of(tmp_path / "run") | more], heartbeat)
    for index in range(2 if more else 1):
        job.until(said, host=index)
    job.processes[1].kill()
    status, _ = job.statuses(WITHIN)
    (line,) = job.err(0).splitlines()
    traces = tmp_path / "run" / "traces" / "host_00000.txt"
    assert status != 0 and line.startswith("error: ") and str(traces) in line, line
    assert len(traces.read_text().splitlines()) > 5


def test_a_host_that_asks_the_others_to_end_while_nothing_can_be_saved_ends_them(tmp_path, start_hosts):
    """Host 1 waits for host 0, which is still on its way."""
    job = start_hosts("job", 2, 4, [run_of(tmp_path / "run") | {"waits": {"0": 60}}])
    job.until("waiting")
    job.processes[1].send_signal(signal.SIGHUP)
    assert job.statuses(WITHIN) == [75, 75]
    expected = "SIGHUP: ended at once; the same command goes on from the newest checkpoint, or from the beginning"
    assert [job.err(host).startswith(expected) and job.err(host).count("\n") for host in range(2)] == [1, 1]


def test_hosts_share_the_questions_of_a_file_and_another_number_goes_on(tmp_path):
    rows, output = [{"prompt": f"question {i}"} for i in range(7)], tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--checkpoint", "none", "--input", str(tmp_path / "in.jsonl"), "--output"]
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", "2", "--host"]
    output.write_text('{"prompt": "question 0", "answer": "before"}\n{"prompt": "ques')

    def start(log, *arguments):
        files = (tmp_path / f"{log}.out", tmp_path / f"{log}.err")
        return forked.Process("tests.answering_host", [*given, *arguments], REPOSITORY, dict(os.environ), *files)

    # Only host 0 sees the output.
    jobs = [start(0, output, *together, 0), start(1, tmp_path / "absent" / "out.jsonl", *together, 1)]
    assert [job.wait(WITHIN) for job in jobs] == [0, 0], (tmp_path / "0.err").read_text()
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [row["answer"] for row in found] == ["before", *("host 0", "host 1") * 3]
    assert "1 of 7 answers: going on" in (tmp_path / "0.err").read_text() and not (tmp_path / "1.err").read_text()
    whole = output.read_bytes()
    output.write_bytes(whole[:-20])
    assert start("alone", output).wait(WITHIN) == 0
    last = json.loads(output.read_text().splitlines()[-1])
    assert last == rows[-1] | {"answer": "host 0"} and output.read_bytes().count(b"\n") == 7


def test_the_command_names_the_host_that_did_not_start():
    command = [sys.executable, "-m", "hovle_jax.train", "--config", "configs/contrast.py", "--host_timeout=2"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--hosts", "3", "--host", "0"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=WITHIN)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: hosts 1-2 of 3 did not start within 2 s; came: 0 (")
    assert len(ended.stderr.splitlines()) == 1
