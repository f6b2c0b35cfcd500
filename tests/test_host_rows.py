"""Which rows each host makes where hosts do not follow each other on the mesh, as on a torus of several hosts."""

import collections
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from hovle_jax.config import MeshConfig
from hovle_jax.hardware import topology
from hovle_jax.hosts import distributed
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from tests.interleaved_host import ROWS, WIDTH

WITHIN = 120  # seconds for two processes, on busy cores


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh needs to know of a TPU."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def square_slice():
    """4 x 4 chips, of which each quarter is a host: hosts 0 and 1 share the first two lines, 2 and 3 the others.

    Numbered by host, as libtpu does it, and not along the lines.
    """
    places = sorted((x // 2 * 2 + y // 2, x, y) for x in range(4) for y in range(4))
    return [Chip(i, host, (x, y, 0)) for i, (host, x, y) in enumerate(places)]


def rows_of_hosts(mesh, batch_size, monkeypatch):
    """[(rows, whether it is their first host) of each host]."""
    found = []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        found.append(distributed.host_rows(Placement(mesh).batch_sharding, batch_size))
    return found


def test_hosts_of_a_torus_take_the_rows_of_their_quarter(monkeypatch):
    """Rows go along the lines: 0 to 3 to the chips of the first, 4 to 7 to those of the second."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=16), square_slice())
    assert rows_of_hosts(mesh, 16, monkeypatch) == [
        ((0, 1, 4, 5), True), ((2, 3, 6, 7), True), ((8, 9, 12, 13), True), ((10, 11, 14, 15), True),
    ]  # fmt: skip


def test_hosts_of_a_torus_whose_chips_share_rows_in_pairs(monkeypatch):
    """tensor=2: two neighbours of a line hold parts of the same two rows."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2), square_slice())
    assert rows_of_hosts(mesh, 16, monkeypatch) == [
        ((0, 1, 4, 5), True), ((2, 3, 6, 7), True), ((8, 9, 12, 13), True), ((10, 11, 14, 15), True),
    ]  # fmt: skip


def test_hosts_of_a_torus_whose_lines_are_one_row_make_it_both(monkeypatch):
    """tensor=4: a line lies on two hosts; the first of them counts what is broken."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=4), square_slice())
    assert rows_of_hosts(mesh, 4, monkeypatch) == [((0, 1), True), ((0, 1), False), ((2, 3), True), ((2, 3), False)]


@pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed (the extra 'tpu')")
def test_libtpu_puts_its_hosts_so():
    hosts = collections.Counter(
        (d.process_index, d.coords[0] // 2, d.coords[1] // 2) for d in topology.find("v5e-16").devices()
    )
    assert len(hosts) == 4 and set(hosts.values()) == {4}  # a quarter of the square each


def start(host, port):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.interleaved_host", f"127.0.0.1:{port}", str(host)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[1], **options)


def test_rows_of_interleaved_hosts_become_the_global_batch():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [start(host, port) for host in range(2)]
    try:
        ended = [process.communicate(timeout=WITHIN) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended[0][1]
    told = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    # Eight devices of two rows each; host 0 has every other one, from the first on.
    assert [x["rows"] for x in told] == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    for x in told:
        assert x["first"] and x["shape"] == [ROWS, WIDTH]
        assert x["weighted"] == sum(row**2 for row in range(ROWS))
        assert x["places"] == {str(row): [row, row + 1] for row in x["rows"][::2]}
