"""Several hosts as one run: how they start, what must be equal on all of them, and how a failure ends them all.

In a run of one process nothing here has an effect.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from hovle_jax.errors import UserError
from hovle_jax.hosts.rollcall import numbers, roll_call
from hovle_jax.system.last_word import LastWord, last_word

# Without a heartbeat for so long jax considers a host dead, and ends the others. They are sent by threads of C++, which
# compiling does not hold up; only a machine that stands still for half of this time does.
HEARTBEAT_SECONDS = 45
WAIT_MS = 7 * 24 * 3600 * 1000  # hosts wait for each other while one indexes or scores; a failure ends it earlier
FAREWELL_SECONDS = 2  # host 0 stays so long, so that the others can still read why the run ends
TRACES = "traces"  # folder in a run's
ENDING = "hovle_jax/ending"  # key in the store: why the run ends; null where nothing failed

_counts: dict[str, Iterator[int]] = {}  # by name: every key and barrier can be used only once
_last_word: LastWord | None = None
_leaving = threading.Lock()


class SharedError(UserError):
    """A user's mistake that all hosts find at the same time, so that none has to tell the others."""


def start(
    coordinator: str = "",
    hosts: int = 0,
    host: int = -1,
    timeout: float = 300,
    announcement: dict[str, Any] | None = None,
) -> None:
    """Makes this process a host of a run of several hosts; does nothing for one host.

    On a TPU pod, in GKE, under Slurm and Open MPI jax detects the hosts; elsewhere all three arguments are needed.

    Args:
      coordinator: HOST:PORT of host 0.
      hosts, host: the number of hosts (1: this process alone, whatever jax detects), and the index of this one.
      timeout: seconds in which all hosts must start.
      announcement: JSON values that must be equal on all hosts, as their software must.
    Raises:
      UserError: hosts are missing or differ; it names them.
    """
    coordinator, hosts, host, devices = _find_hosts(coordinator, hosts, host, timeout)
    if hosts <= 1:
        return
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator!r} is not HOST:PORT, as 10.0.0.1:8476")
    own = {"name": socket.gethostname(), "software": software(), **(announcement or {})}
    roll_call(own, (name.strip("[]"), int(port)), hosts, host, timeout)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; hosts/preemption.py has it
    jax.distributed.initialize(
        coordinator,
        hosts,
        host,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 60),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _find_hosts(coordinator: str, hosts: int, host: int, timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    """-> (coordinator, hosts, host, local device ids or None)."""
    given = {"--coordinator": coordinator, "--hosts": hosts, "--host": host >= 0}
    if hosts == 1 and not coordinator:
        return "", 1, 0, None
    if any(given.values()):
        missing = [flag for flag, value in given.items() if not value]
        if missing:
            raise UserError(f"{' and '.join(missing)} must be given too: --coordinator HOST:PORT --hosts N --host I")
        if not host < hosts:
            raise UserError(f"--host={host} is not one of --hosts={hosts}, which count from 0")
        return coordinator, hosts, host, None
    if jax.config.jax_platforms == "cpu":  # perhaps on a machine of a pod, but not on its TPUs
        return "", 1, 0, None
    return _detected(timeout)


def _detected(timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() uses

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout))
    except Exception as error:  # whatever a cluster's interface raises
        raise UserError(
            f"jax sees a cluster and cannot find its hosts ({error}); give --coordinator HOST:PORT --hosts N --host I, "
            "or --hosts 1 for this machine alone"
        ) from error
    coordinator, hosts, host, devices = found
    if not coordinator:
        return "", 1, 0, None
    assert hosts is not None and host is not None
    return coordinator, hosts, host, devices


def software() -> dict[str, str]:
    """{name: version}, and a digest of this package's code."""
    content = hashlib.sha256()
    package = pathlib.Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        content.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")}
    return versions | {"hovle_jax": content.hexdigest()[:12]}


def several() -> bool:
    """Whether there are several hosts; starts no backend."""
    return jax.distributed.is_initialized()


def is_leader() -> bool:
    """Whether this process is host 0, which alone prints, and writes everything but the arrays."""
    return not several() or jax.process_index() == 0


def _client():
    from jax._src.distributed import global_state  # jax has no public access to its key-value store

    return global_state.client


def wait(name: str) -> None:
    """A barrier: returns when all hosts have called it with this name."""
    if several():
        _client().wait_at_barrier(f"hovle_jax/{_once(name)}", WAIT_MS)


def _once(name):
    number = next(_counts.setdefault(name, itertools.count()))
    return f"{name}/{number}"


def gather(name: str, value: object) -> list[Any]:
    """All-gathers JSON values -> every host's, in the order of hosts."""
    if not several():
        return [value]
    client, folder = _client(), f"hovle_jax/{_once(name)}"
    client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(f"{folder}/barrier", WAIT_MS)
    values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    return [values[host] for host in range(jax.process_count())]


def check_same(what: str, value: object, remedy: str) -> None:
    """Raises SharedError on all hosts where one's JSON value differs from host 0's."""
    values = gather(what, value)
    others = {host for host, theirs in enumerate(values) if theirs != values[0]}
    if others:
        raise SharedError(
            f"host{'s' * (len(others) > 1)} {numbers(others)} of {len(values)} and host 0 differ in {what}: "
            f"{values[min(others)]} there, {values[0]} on host 0; {remedy}"
        )


def check_shared(folder: str | os.PathLike) -> None:
    """Raises SharedError on all hosts where one does not see what host 0 writes into the run's folder."""
    place = pathlib.Path(folder)
    of = lambda do: lambda name: do(place / name)
    check_seen(str(folder), of(pathlib.Path.touch), of(pathlib.Path.exists), of(pathlib.Path.unlink))


def check_seen(
    place: str, write: Callable[[str], object], sees: Callable[[str], bool], remove: Callable[[str], object]
) -> None:
    """`check_shared` of any place, by what writes, sees and removes a file of a name in it."""
    if not several():
        return
    name = gather("probe", f".seen_by_all_{secrets.token_hex(4)}")[0]
    if is_leader():
        write(name)
    wait("probe is there")
    blind = [host for host, seen in enumerate(gather("probe is seen", sees(name))) if not seen]
    if is_leader():
        remove(name)
    if blind:
        raise SharedError(
            f"host{'s' * (len(blind) > 1)} {numbers(blind)} of {jax.process_count()} cannot see what host 0 writes "
            f"into {place}; give a place that all hosts share with --workdir"
        )


def reached_by_all(name: object) -> bool:
    """Whether all hosts have called this with the name so far; waits for none."""
    if not several():
        return True
    client, folder = _client(), f"hovle_jax/reached/{name}"
    client.key_value_set(f"{folder}/{jax.process_index()}", "")
    return len(client.key_value_dir_get(folder)) == jax.process_count()


def host_rows(sharding: jax.sharding.NamedSharding, batch_size: int) -> tuple[tuple[int, ...], bool]:
    """The rows of the global batch that this host makes, and whether it is the first host that makes them.

    Hosts whose devices have different shards of the same rows (a tensor or sequence axis between them) make them all.

    Args:
      sharding: of a batch (`Placement.batch_sharding`).
    Raises:
      UserError: two hosts share some of their rows but not all.
    """
    blocks: dict[int, set[tuple[int, int]]] = {}  # by host: (first row, last row + 1)
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


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run of several hosts


@contextlib.contextmanager
def ending_together(folder: str | os.PathLike | None = None) -> Iterator[None]:
    """An error inside the block ends the run on all hosts; the others would wait forever in a collective.

    Each host prints one line. Traces, and what libraries print of lost hosts, go to files.

    Args:
      folder: the run's, for FOLDER/traces/host_00001.txt; None = traces are printed.
    """
    if not several():
        yield
        return
    with _file_of_traces(folder):
        watch = threading.Thread(target=_watch, daemon=True)
        watch.start()
        try:
            yield
            wait("end")
        except UserError as error:
            if not isinstance(error, SharedError):
                _tell(_reason(error))
            _leave(f"error: {error}", status=2)
        except BaseException as error:
            _tell(_reason(error))
            where = _keep_trace()
            _leave(
                f"error: this host failed, or lost another ({type(error).__name__}{where}), which ends the run; "
                "the same command resumes it from the newest checkpoint"
            )
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was faster
            _client().key_value_set(ENDING, "null")
        watch.join()


@contextlib.contextmanager
def _file_of_traces(folder):
    global _last_word
    if folder is None:
        yield
        return
    path = pathlib.Path(folder).absolute() / TRACES / f"host_{jax.process_index():05}.txt"
    line = (
        f"error: host {jax.process_index()} ({socket.gethostname()}) was ended, as hosts are when one of them is lost; "
        f"see {path}; the same command resumes the run from the newest checkpoint"
    )
    with last_word(path, line) as _last_word:
        yield
    _last_word = None


def _keep_trace():
    """Writes the trace of the current error -> where it is, for the line."""
    if _last_word is None:
        traceback.print_exc()
        return ""
    with contextlib.suppress(OSError), _last_word.path.open("a") as file:
        traceback.print_exc(file=file)
    return f": see {_last_word.path}"


def end_all(message: str, status: int) -> None:
    """Ends this process at once, and with it the run on all hosts; may be called in any thread.

    Args:
      message: the last line of this host; the others print it too.
    """
    if several():
        _tell({"host": jax.process_index(), "text": message, "status": status})
    _leave(message, status)


def _reason(error):
    text = f"error: host {jax.process_index()} ({socket.gethostname()}) stopped: {type(error).__name__}: {error}"
    return {"host": jax.process_index(), "text": " ".join(text.split())[:2000], "status": 1}


def _tell(reason):
    """Tells the others why this host ends. Where another host was first, `_watch` ends this one with its reason."""
    try:
        _client().key_value_set(ENDING, json.dumps(reason))
    except jax.errors.JaxRuntimeError:
        time.sleep(FAREWELL_SECONDS)


def _watch():
    """Ends this process when another host fails."""
    try:
        reason = json.loads(_client().blocking_key_value_get(ENDING, WAIT_MS))
    except jax.errors.JaxRuntimeError as error:  # the store is on host 0
        text = f"error: host 0 is gone: {' '.join(str(error).split())[:200]}"
        reason = {"host": 0, "text": text, "status": 1}
    if reason and reason["host"] != jax.process_index():
        _leave(reason["text"], reason["status"])


def _leave(message, status=1):
    """Ends this process at once; an orderly exit would wait for hosts that have gone."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end it, with a line of its own
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    if _last_word is not None:
        _last_word.spoken()
    for worker in multiprocessing.active_children():
        worker.kill()
    if several() and is_leader():
        time.sleep(FAREWELL_SECONDS)
    os._exit(status)
