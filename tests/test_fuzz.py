"""The fuzzer: a few inputs for every reader, and that it sees what it looks for. `python -m tests.fuzz` makes more."""

import collections
import mmap
import time

import pytest

from hovle_jax.errors import UserError
from tests.fuzz import __main__ as command
from tests.fuzz import run
from tests.fuzz.readers import READERS, Reader

INPUTS = {"rollcall": 8, "imported": 12, "parquet": 24}  # of the slower ones; 40 of others
SLOW = ("gguf", "config")  # whose models are made first


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in READERS])
def test_mutated_files_are_read_or_refused(name, tmp_path):
    if name in ("parquet", "gguf"):
        pytest.importorskip({"parquet": "pyarrow", "gguf": "gguf"}[name])
    seeds = list(READERS[name].seeds())
    assert all(run.make_input(name, 0, 3, seeds) == run.make_input(name, 0, 3, seeds) for _ in range(2))
    refused = 0
    for index in range(INPUTS.get(name, 40)):
        kind, refusal, trace = run._one(READERS[name], run.make_input(name, 0, index, seeds), tmp_path)
        assert not kind, f"input {index}: {trace}"
        refused += refusal
    assert refused or name in ("jsonl", "rollcall"), "a mutation reaches what is checked"
    assert not list(tmp_path.iterdir())


def misbehave(files, _):
    """Computes or waits without end, ends, takes memory or raises, as the input's content says."""
    content = files["file"]
    if content[0] % 8 == 5:
        return
    while content[0] % 8 == 0:
        pass
    if content[0] % 8 == 7:
        time.sleep(60)
    if content[0] % 8 == 1:
        run.os._exit(7)
    if content[0] % 8 == 2:
        _touched(run.MEMORY + 2**21)
    if content[0] % 8 == 3:
        raise KeyError("x")
    if content[0] % 8 == 4:
        try:
            mmap.mmap(-1, 3 * run.MEMORY)
        except OSError:
            raise UserError("no memory") from MemoryError()
    raise UserError("no")


def _touched(size):
    """Takes new memory of the system: what other tests have freed lies in this process, and to take it again counts for
    nothing."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1


@pytest.fixture
def bad(monkeypatch):
    """-> a fuzzer of inputs with these contents, each with so many seconds of the processor."""
    monkeypatch.setattr(run, "MEMORY", 2**25)

    def fuzz(contents, seconds, kept):
        monkeypatch.setitem(READERS, "bad", Reader(lambda: [{"file": b"5"}], misbehave, seconds))
        monkeypatch.setattr(run, "make_input", lambda _name, _seed, index, _seeds: {"file": contents[index]})
        return run.fuzz("bad", len(contents), 0, kept)

    return fuzz


@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_waits_ends_by_the_clock(bad, tmp_path):
    found = bad([b"7", b"5"], 0.05, tmp_path)
    assert found.findings == {"hang": 1} and found.inputs == 2


@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_is_wrong_is_found_and_kept(bad, tmp_path):
    # Far more time than the memory takes, for a busy machine.
    found = bad([b"0", b"1", b"2", b"3", b"4", b"5", b"6"], 2, tmp_path)
    kinds = collections.Counter(kind.split(" at ")[0] for kind in found.findings.elements())
    assert kinds == {"hang": 1, "ended with 7": 1, "memory": 2, "KeyError": 1}
    assert (found.inputs, found.refused) == (7, 3)
    kept = sorted(tmp_path.glob("bad/*/input-*"))
    assert len(kept) == 5 and {path.name for path in kept} == {f"input-{i}" for i in range(5)}
    with pytest.raises(KeyError):
        command.replay("bad", next(path for path in kept if path.name == "input-3"))


def test_the_command(capsys, tmp_path):
    line = ["--inputs", "5", "--seed", "3", "--kept", str(tmp_path), "--reader", "jsonl"]
    assert command.main(line) == 0
    assert "jsonl: 5 inputs" in capsys.readouterr().out
