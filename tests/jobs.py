"""Runs of tests/host.py in processes, one for each host, on loopback."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import time

from tests import forked

REPOSITORY = pathlib.Path(__file__).parents[1]
WITHIN = 300  # seconds in which a job ends, on busy cores


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def starting(tmp_path):
    """Gives a function of (name, hosts, devices of each, runs) -> Job; what still runs after the block is killed."""
    jobs = []

    def start(name, hosts, devices, runs, heartbeat=60):
        folder = tmp_path / name
        folder.mkdir()
        job = dict(hosts=hosts, coordinator=f"127.0.0.1:{free_port()}", heartbeat=heartbeat, runs=runs)
        (folder / "job.json").write_text(json.dumps(job))
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        start = lambda i: forked.Process(
            "tests.host", [folder / "job.json", i], REPOSITORY, env, folder / f"{i}.out", folder / f"{i}.err"
        )
        jobs.append(Job(folder, list(map(start, range(hosts)))))
        return jobs[-1]

    try:
        yield start
    finally:
        for process in (process for job in jobs for process in job.processes):
            process.kill()


@dataclasses.dataclass
class Job:
    """Hosts that were started; `out` and `err` are what one has written."""

    folder: pathlib.Path
    processes: list

    def out(self, host):
        return self._written(f"{host}.out")

    def err(self, host):
        return self._written(f"{host}.err")

    def _written(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""  # its process has only begun

    def statuses(self, within):
        """How the hosts have ended; fails after `within` seconds."""
        deadline = time.monotonic() + within
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def until(self, text, within=WITHIN, host=0):
        deadline = time.monotonic() + within
        while text not in self.out(host) + self.err(host):
            assert time.monotonic() < deadline and self.processes[host].poll() is None, self.err(host)
            time.sleep(0.1)


def run_of(folder, stage="contrast", mesh=None, data=None, corpora=None, **changes):
    """A run as tests/host.py reads it."""
    changes = {"log_every": 1, "steps": 5000} | changes
    run = dict(stage=stage, mesh=mesh or {}, data=data or {}, changes=changes, folder=str(folder))
    return run | ({"corpora": corpora} if corpora else {})
