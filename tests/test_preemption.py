"""Requests to end: signals and the cloud's notice, what is saved, and how the process ends."""

import http.server
import os
import signal
import sys
import threading
import time

import pytest

from hovle_jax.hosts import distributed, maintenance, preemption
from hovle_jax.report.metrics import read_metrics
from hovle_jax.system import signals
from tests.jobs import WITHIN, run_of

SIGNALS = [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130), (signal.SIGHUP, "SIGHUP", 129)]


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen within 60 s"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def asked_by_nobody(monkeypatch):
    """The next test's run is not asked to end by what this one asks; no signal is ignored, as under nohup."""
    monkeypatch.setattr(preemption, "_answering", preemption._Answering())
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ends(monkeypatch):
    """What the process would have ended with: [(line, status)]."""
    found = []
    monkeypatch.setattr(distributed, "end_all", lambda line, status: found.append((line, status)))
    return found


@pytest.mark.parametrize("number, name, status", SIGNALS)
def test_a_signal_is_answered_by_a_save_and_the_second_one_by_the_end(number, name, status, ends, capsys):
    with preemption.listening():
        with preemption.saving():
            assert not preemption.preempted() and preemption.request() is None  # a step is done
            os.kill(os.getpid(), number)
            until(preemption.preempted)
            assert preemption.request() == preemption.Request(name, status) and not ends
            os.kill(os.getpid(), number)
            until(lambda: ends)
        [(line, ended)] = ends
        assert ended == preemption.ENDED_UNSAVED and line.startswith(f"{name}: ended at once; the same command goes on")
        ends.clear()
        os.kill(os.getpid(), number)  # what was asked for is saved by now
        until(lambda: ends)
        assert ends[0][1] == status
    assert capsys.readouterr().err.startswith(f"{name}: saving after this step, then ending")


@pytest.mark.parametrize("number, name, status", SIGNALS)
def test_where_no_steps_are_made_the_first_signal_is_the_end(number, name, status, ends):
    with preemption.listening():
        os.kill(os.getpid(), number)
        until(lambda: ends)
        with preemption.reporting():
            os.kill(os.getpid(), number)
            until(lambda: len(ends) == 2)
        with preemption.saving():  # the first step is being compiled
            os.kill(os.getpid(), number)
            until(lambda: len(ends) == 3)
    (loading, first), (reporting, second), (compiling, third) = ends
    assert (first, second, third) == (75, status, 75) and compiling == loading
    assert "or from the beginning where there is none" in loading and "goes on with its report" in reporting


def test_signals_are_what_they_were_afterwards_and_ignored_ones_stay_so(ends):
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not ends
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_of_the_block_a_loop_leaves_signals_alone():
    with preemption.saving():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_printed_after_the_terminal_has_gone_is_no_error(monkeypatch):
    master, slave = os.openpty()
    os.close(master)
    with open(slave, "w") as gone, open(os.devnull) as silent:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "stderr", silent)
        with pytest.raises(OSError):
            os.write(slave, b"x")
        signals.leave_terminal()
        print("nobody hears this", flush=True)


def test_a_signal_is_heard_while_the_main_thread_is_in_c(ends):
    """A lock that another thread releases once the signal was heard: a handler in Python would come too late."""
    lock = threading.Lock()
    lock.acquire()

    def release():
        until(lambda: ends)
        lock.release()

    with preemption.listening():
        threading.Thread(target=release).start()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert lock.acquire(timeout=90)
    assert len(ends) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The machine's notice


def test_a_notice_is_answered_once_and_without_an_end(ends, capsys):
    with preemption.listening():
        preemption._notice("preempted")
        with preemption.saving():
            assert preemption.preempted()
            preemption._notice("preempted")
    assert preemption.request() == preemption.Request("the machine's notice preempted", 143) and not ends
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("notices, told", [
    (["", "", "TERMINATE_ON_HOST_MAINTENANCE"], ["TERMINATE_ON_HOST_MAINTENANCE"]),
    (["preempted", "preempted"], []),  # it was there before the run: started again for it, it would end again
])  # fmt: skip
def test_a_notice_counts_when_it_comes(notices, told, monkeypatch):
    monkeypatch.setattr(maintenance, "EVERY_SECONDS", 0.001)
    given, heard, done = iter(notices), [], threading.Event()

    def read():
        notice = next(given, None)
        if notice is None:
            done.set()
        return notice or ""

    with maintenance.noticed(heard.append, read):
        until(lambda: heard or done.is_set())
    assert heard == told


@pytest.fixture
def metadata_server(monkeypatch):
    """{name: what it says}, of a metadata server as Compute Engine's."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(values[self.path.rpartition("/")[2]].encode())

        def log_message(self, *unused):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(maintenance, "INSTANCE", f"http://127.0.0.1:{server.server_port}/instance/")
        monkeypatch.setattr(maintenance, "ANSWER_SECONDS", 60.0)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is asked directly
        yield values
        server.shutdown()


def test_the_metadata_server_is_read(metadata_server):
    assert maintenance.read_notice() == ""
    metadata_server["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # the machine runs on
    assert maintenance.read_notice() == ""
    metadata_server["preempted"] = "TRUE"
    assert maintenance.read_notice() == "preempted"
    metadata_server["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert maintenance.read_notice() == "TERMINATE_ON_HOST_MAINTENANCE"


def test_outside_google_cloud_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance, "read_notice", lambda: pytest.fail("asked"))
    monkeypatch.setattr(maintenance, "PRODUCT", tmp_path / "product_name")
    assert not maintenance.on_google_cloud()
    with maintenance.noticed(pytest.fail):
        pass
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert maintenance.on_google_cloud()
    monkeypatch.setenv("HOVLE_MAINTENANCE", "0")
    assert not maintenance.on_google_cloud()


def test_without_an_answer_there_is_no_notice(monkeypatch):
    monkeypatch.setattr(maintenance, "INSTANCE", "http://127.0.0.1:9/")
    assert maintenance.read_notice() == ""


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_on_one_host_saves_the_step_that_it_was_at_and_goes_on_there(tmp_path, start_hosts):
    run, folder = run_of(tmp_path / "run", checkpoint_every=1000, log_every=3), tmp_path / "run"
    job = start_hosts("job", 1, 1, [run])
    job.until(" 6/5000")
    job.processes[0].send_signal(signal.SIGINT)
    assert job.statuses(WITHIN) == [130]
    (step,) = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert step >= 6 and all(row["step"] % 3 == 0 for row in read_metrics(folder))
    assert job.err(0) == "Ctrl-C: saving after this step, then ending; a second signal ends at once, without\n"
