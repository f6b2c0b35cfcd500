"""Reads mutated inputs in forks with limits of time and memory, and keeps those that are not refused as they should."""

import collections
import dataclasses
import mmap
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Iterator

from tests.fuzz.mutate import Files, mutated
from tests.fuzz.readers import READERS, REFUSALS, Reader

MEMORY = 2**30  # bytes that an input may take
BATCH = 2000  # inputs of a fork
KEPT = 3  # inputs of one kind of finding


@dataclasses.dataclass
class Result:
    """Of one reader: how many inputs, of which so many were refused, in how many seconds; {kind of finding: number}."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def make_input(reader: str, seed: int, index: int, seeds: list[Files]) -> Files:
    """The file set of this number; the same whenever it is asked for."""
    rng = random.Random(f"{reader}/{seed}/{index}")
    return mutated(rng.choice(seeds), seeds, rng)


class _Shared:
    """Two integers that a fork writes and its parent reads: the input it is at, and the refusals so far."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def set(self, at, refused):
        self.memory[:] = struct.pack("<QQ", at, refused)

    def get(self):
        return struct.unpack("<QQ", self.memory[:])


def fuzz(name: str, inputs: int, seed: int, kept: pathlib.Path, start: int = 0) -> Result:
    """Reads so many inputs; what is found lies under KEPT/NAME afterwards."""
    reader, result, began = READERS[name], Result(), time.monotonic()
    seeds = list(reader.seeds())
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for files in seeds:  # valid, and what they import is there for all forks
            reader.read(files, pathlib.Path(folder))
            _empty(folder)
    at, end = start, start + inputs
    while at < end:
        shared = _Shared()
        shared.set(at, 0)
        last = min(at + BATCH, end)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            place = pathlib.Path(folder)
            status = _forked(lambda a=at, z=last, s=shared, f=place: _batch(name, seeds, seed, a, z, s, kept, f))
        reached, refused = shared.get()
        result.refused += refused
        if status == 0:
            at = last
            continue
        kind = "hang" if status in (-signal.SIGALRM, -signal.SIGPROF) else f"ended with {status}"
        _keep(kept / name, make_input(name, seed, reached, seeds), reached, kind, "")
        at = reached + 1
    result.inputs, result.seconds = inputs, time.monotonic() - began
    for kind, number in _found(kept / name):
        result.findings[kind] += number
    return result


def _forked(work):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # of the libraries
        work()
        status = 0
    finally:
        os._exit(status)


def _batch(name, seeds, seed, start, end, shared, kept, folder):
    """In a fork."""
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)  # which ends the process, wherever it is
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    peak, refused, reader = _peak(), 0, READERS[name]
    for index in range(start, end):
        shared.set(index, refused)
        files = make_input(name, seed, index, seeds)
        _limit(reader.seconds)
        kind, refusal, trace = _one(reader, files, folder)
        _limit(0)
        refused += refusal
        if not kind and _peak() - peak > MEMORY:
            kind, peak = "memory", _peak()
        if kind:
            _keep(kept / name, files, index, kind, trace)
    shared.set(end, refused)


def _limit(seconds):
    """Of the processor; and, for what waits, ten times as much by the clock, as other processes may be running."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _one(reader: Reader, files, folder):
    """-> (kind of finding or '', whether it was refused, trace)."""
    try:
        reader.read(files, folder)
        return "", False, ""
    except REFUSALS as error:
        if any(isinstance(cause, MemoryError) for cause in _causes(error)):
            return "memory", True, "".join(traceback.format_exception(error))
        return "", True, ""
    except BaseException as error:
        return _place(error), False, traceback.format_exc()
    finally:
        _empty(folder)


def _empty(folder):
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None


def _causes(error) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error):
    """'ValueError at source.py:120': of the last line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hovle_jax" in pathlib.Path(frame.filename).parts] or frames
    return f"{type(error).__name__} at {pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep(folder, files, index, kind, trace):
    """Writes a finding, the first few of each kind, and counts it."""
    place = folder / "".join(c if c.isalnum() else "_" for c in kind)
    place.mkdir(parents=True, exist_ok=True)
    (place / "kind").write_text(kind)
    with (place / "inputs").open("a") as file:
        file.write(f"{index}\n")
    if len(list(place.glob("input-*"))) < KEPT:
        kept = place / f"input-{index}"
        kept.mkdir(exist_ok=True)
        for name, content in files.items():
            (kept / name).write_bytes(content)
        (kept / "trace").write_text(trace)


def _found(folder):
    for place in sorted(folder.glob("*")):
        yield (place / "kind").read_text(), len((place / "inputs").read_text().splitlines())
