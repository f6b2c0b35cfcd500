"""Several hosts as one run: their start, what must be equal on all of them, and how one's failure ends the others.

Nothing here does anything in a run of one process.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from hovle_jax.errors import UserError
from hovle_jax.hosts.rollcall import numbers, roll_call

HEARTBEAT_SECONDS = 60  # without a sign of life jax takes a host for dead, and ends the others
WAIT_MS = 7 * 24 * 3600 * 1000  # hosts wait for each other while one indexes or scores; a failure ends it earlier
FAREWELL_SECONDS = 2  # in which host 0 can still be asked why the run ends
ENDING = "hovle_jax/ending"  # a key of the store: why the run ends; null where nothing failed

_counts = {}  # of each kind of meeting: keys and barriers are used once


class SharedError(UserError):
    """A user's mistake that all hosts have found together, so that none needs to tell the others."""


def start(
    coordinator: str = "", hosts: int = 0, host: int = -1, timeout: float = 300, announcement: dict | None = None
) -> None:
    """Makes this process one of a run's hosts, where there are several.

    On a TPU pod, in GKE, under Slurm and Open MPI jax finds out who they are; elsewhere all three arguments say it.

    Args:
      coordinator: HOST:PORT of host 0.
      hosts, host: how many there are (1: this process alone, whatever jax finds), and this one's index.
      timeout: seconds in which all of them must have started.
      announcement: what must be the same on all hosts besides their software; a dict of JSON values.
    Raises:
      UserError: hosts are missing, or differ; it says which.
    """
    coordinator, hosts, host, devices = _who_are_we(coordinator, hosts, host, timeout)
    if hosts <= 1:
        return
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator!r} is not HOST:PORT, as 10.0.0.1:8476")
    own = {"name": socket.gethostname(), "software": software(), **(announcement or {})}
    roll_call(own, (name.strip("[]"), int(port)), hosts, host, timeout)
    jax.distributed.initialize(
        coordinator,
        hosts,
        host,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 60),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _who_are_we(coordinator, hosts, host, timeout):
    """-> (coordinator, hosts, host, local device ids or None)."""
    said = {"--coordinator": coordinator, "--hosts": hosts, "--host": host >= 0}
    if hosts == 1 and not coordinator:
        return "", 1, 0, None
    if any(said.values()):
        missing = [flag for flag, value in said.items() if not value]
        if missing:
            raise UserError(f"{' and '.join(missing)} must be given too: --coordinator HOST:PORT --hosts N --host I")
        if not host < hosts:
            raise UserError(f"--host={host} is not one of --hosts={hosts}, which count from 0")
        return coordinator, hosts, host, None
    if jax.config.jax_platforms == "cpu":  # on a pod's machine, perhaps, but not for its TPUs
        return "", 1, 0, None
    return _detected(timeout)


def _detected(timeout):
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:  # whatever a cluster's interface raises
        raise UserError(
            f"jax sees a cluster here and cannot read who is in it ({error}); say it with --coordinator HOST:PORT "
            "--hosts N --host I, or --hosts 1 for this machine alone"
        ) from error
    return found if found[0] else ("", 1, 0, None)


def software() -> dict[str, str]:
    """Versions, and a digest of this package's code."""
    content = hashlib.sha256()
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        content.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")}
    return versions | {"hovle_jax": content.hexdigest()[:12]}


def several() -> bool:
    """Whether there are other hosts; starts no backend."""
    return jax.distributed.is_initialized()


def is_leader() -> bool:
    """Whether this process is host 0, which alone speaks and writes all but the arrays."""
    return not several() or jax.process_index() == 0


def _client():
    from jax._src.distributed import global_state  # jax has no public way to its key-value store

    return global_state.client


def wait(name: str) -> None:
    """All hosts wait here for each other."""
    if several():
        _client().wait_at_barrier(f"hovle_jax/{_once(name)}", WAIT_MS)


def _once(name):
    number = next(_counts.setdefault(name, itertools.count()))
    return f"{name}/{number}"


def gather(name: str, value: object) -> list:
    """Every host's JSON value, in the order of hosts."""
    if not several():
        return [value]
    client, folder = _client(), f"hovle_jax/{_once(name)}"
    client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(f"{folder}/barrier", WAIT_MS)
    values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    return [values[host] for host in range(jax.process_count())]


def check_same(what: str, value: object, remedy: str) -> None:
    """Raises SharedError where one has another JSON value than host 0."""
    values = gather(what, value)
    others = {host for host, theirs in enumerate(values) if theirs != values[0]}
    if others:
        raise SharedError(
            f"host{'s' * (len(others) > 1)} {numbers(others)} of {len(values)} and host 0 differ in {what}: "
            f"{values[min(others)]} there, {values[0]} on host 0; {remedy}"
        )


def check_shared(folder: str | os.PathLike) -> None:
    """Raises SharedError where one does not see what host 0 writes into the run's folder."""
    if not several():
        return
    probe = folder / gather("probe", f".seen_by_all_{secrets.token_hex(4)}")[0]
    if is_leader():
        probe.touch()
    wait("probe is there")
    blind = [host for host, sees in enumerate(gather("probe is seen", probe.exists())) if not sees]
    if is_leader():
        probe.unlink()
    if blind:
        raise SharedError(
            f"host{'s' * (len(blind) > 1)} {numbers(blind)} of {jax.process_count()} cannot see what host 0 writes "
            f"into {folder}; give a folder of a file system that all hosts share with --workdir"
        )


def everyone_says(name: object) -> bool:
    """Whether all hosts have called this with the name; for those that the others need not wait for."""
    if not several():
        return True
    client, folder = _client(), f"hovle_jax/said/{name}"
    client.key_value_set(f"{folder}/{jax.process_index()}", "")
    return len(client.key_value_dir_get(folder)) == jax.process_count()


def host_rows(sharding: jax.sharding.NamedSharding, batch_size: int) -> tuple[tuple[int, ...], bool]:
    """Which rows of the global batch this host makes, and whether it is the first of those that make them.

    Hosts whose devices hold different shards of the same rows (a tensor or sequence axis between them) make them all.

    Args:
      sharding: of a batch (`Placement.batch_sharding`).
    Raises:
      UserError: two hosts hold some rows in common, and others not.
    """
    blocks = {}  # of each host: (first row, last row + 1)
    for device, (rows, *_) in sharding.devices_indices_map((batch_size,)).items():
        blocks.setdefault(device.process_index, set()).add(rows.indices(batch_size)[:2])
    own = blocks[jax.process_index()]
    for host, theirs in blocks.items():
        if own & theirs and own != theirs:
            raise UserError(
                f"mesh {dict(sharding.mesh.shape)} gives hosts {jax.process_index()} and {host} some rows of "
                "the batch in common; choose mesh sizes that divide by the devices of a host, or divide them"
            )
    rows = tuple(row for first, end in sorted(own) for row in range(first, end))
    return rows, jax.process_index() == min(host for host, theirs in blocks.items() if theirs == own)


def preempted() -> bool:
    """Whether all hosts are to save and stop here, because one of them was preempted (SIGTERM).

    To be called on all hosts equally often, at steps: jax agrees on a step that none of them has passed.
    """
    if not several():
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_counts.setdefault("steps", itertools.count())))


# ---------------------------------------------------------------------------------------------------------------------
# How a run of several hosts ends


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What is raised within ends the run on all hosts: the others would wait for this one in a collective forever."""
    if not several():
        yield
        return
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    try:
        yield
        wait("end")
    except UserError as error:
        if not isinstance(error, SharedError):
            _tell(error)
        _leave(f"error: {error}", status=2)
    except BaseException as error:
        _tell(error)
        traceback.print_exc()
        _leave("error: this host failed, and so the run; the same command goes on from the newest checkpoint")
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was faster
        _client().key_value_set(ENDING, "null")
    watch.join()


def _tell(error):
    """Says to the others why this host ends. Where another was first, `_watch` ends this one with that reason."""
    text = f"host {jax.process_index()} ({socket.gethostname()}) stopped: {type(error).__name__}: {error}"
    reason = {"host": jax.process_index(), "text": " ".join(text.split())[:2000]}
    try:
        _client().key_value_set(ENDING, json.dumps(reason))
    except jax.errors.JaxRuntimeError:
        time.sleep(FAREWELL_SECONDS)


def _watch():
    """Ends this process when another host fails."""
    try:
        reason = json.loads(_client().blocking_key_value_get(ENDING, WAIT_MS))
    except jax.errors.JaxRuntimeError as error:  # host 0 keeps the store
        reason = {"host": 0, "text": f"host 0 is gone: {' '.join(str(error).split())[:200]}"}
    if reason and reason["host"] != jax.process_index():
        _leave(f"error: {reason['text']}")


def _leave(message, status=1):
    """Ends this process at once: an orderly end would wait for hosts that do not come any more."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    if is_leader():
        time.sleep(FAREWELL_SECONDS)
    os._exit(status)
