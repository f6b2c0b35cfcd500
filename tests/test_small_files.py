"""Small files of a run: a kill leaves the old content or the new, and a damaged one is named in one line."""

import os

import pytest

from hovle_jax.checkpoints import load_model_config
from hovle_jax.data.bad_samples import BadEvent, BadSamples, read_bad_samples
from hovle_jax.data.batch import CorpusSummary
from hovle_jax.data.text.tokenizer import load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.report import facts, goodput, runs, tracking
from hovle_jax.system import files
from hovle_jax.system.json_lines import whole_lines
from hovle_jax.training import run_folder
from tests import micro

CONFIG = micro.run_config("instruct")
SUMMARY = CorpusSummary(samples=3, digest="d", text="")
EVENT = BadEvent(1, "source", "shard", "sample", "missing_image", "a.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with its small files."""
    folder = micro.finished_run(tmp_path_factory.mktemp("run"))
    (folder / "checkpoints" / "1").mkdir(parents=True)
    run_folder.save_config(folder, CONFIG)
    run_folder.check_same_data(folder, SUMMARY)
    goodput.write_time(folder, 1, {"training": 1.0})
    facts.write_facts(folder)
    tracking._run_id(folder)
    files.write_json(folder / "results.json", {"accuracy": 1.0})
    BadSamples(folder, 1.0).add([EVENT], 1)
    return folder


READERS = {
    "config.json": lambda folder: run_folder.check_same_config(folder, CONFIG),
    "data.json": lambda folder: run_folder.check_same_data(folder, SUMMARY),
    "time.json": goodput.read_time,
    "facts.json": facts.read_facts,
    "tracking.json": tracking._run_id,
    "results.json": runs.Run.read,
    "bad_samples.jsonl": read_bad_samples,
    "tokenizer.model": load_tokenizer,
    "model/config.json": load_model_config,
}


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "no UTF-8", "a list"])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(name, damage, run):
    path, read = run / name, READERS[name]
    read(run)
    content = path.read_bytes()
    made = {
        "empty": b"",
        "half": content[: len(content) // 2] + b"\n" * name.endswith("jsonl"),
        "noise": bytes(byte ^ 5 for byte in content) + b"\n",
        "no UTF-8": b"\xff\xfe\n",
        "a list": b"[1]\n",
    }[damage]
    path.write_bytes(made)
    try:
        read(run)
    except UserError as error:
        assert path.name in str(error) and len(str(error).splitlines()) == 1
    else:
        harmless = {("bad_samples.jsonl", "empty"), ("facts.json", "a list"), ("results.json", "a list")}
        assert (name, damage) in harmless
    finally:
        path.write_bytes(content)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, name, killed)
            files.write_json(path, {"a": 2})
        assert files.read_json(path) == {"a": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", killed)
        patch.setattr(os, "getpid", lambda: 1)  # nothing of this process's own will replace what it leaves
        files.write_json(path, {"a": 3})
    (tmp_path / "model.partial").mkdir()
    assert (tmp_path / "file.json.1.partial").exists()
    files.remove_unfinished(tmp_path)
    files.write_json(path, {"a": 2})
    assert files.read_json(path, ["a"]) == {"a": 2}
    assert {inner.name for inner in tmp_path.iterdir()} == {path.name, "model.partial"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "new" / "file").parent.mkdir()
    (tmp_path / "new" / "file").mkdir()
    with pytest.raises(UserError, match="cannot write .*new/file: Is a directory; what was there before is whole"):
        files.write_whole(tmp_path / "new" / "file", "text")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with pytest.raises(UserError, match="cannot read .*nothing: No such file or directory; bring it back"):
        files.read_json(tmp_path / "nothing")


def test_the_reason_of_an_error_is_one_line():
    assert files.reason_of(OSError(28, "x")) == "the disk is full"
    assert files.reason_of(ValueError("a\nb [os_error_code='27']")) == "File too large"
    assert files.reason_of(OSError(-2, "Name or service not known")) == "[Errno -2] Name or service not known"
    assert files.reason_of(ValueError("a\nb")) == "a b" and files.reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_lines_that_were_cut_off_go_without_rewriting_the_file(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"a\nb\nhalf")
    number = path.stat().st_ino
    assert whole_lines(path) == ["a", "b"] and path.read_bytes() == b"a\nb\n" and path.stat().st_ino == number
    path.write_bytes(b"half")
    assert whole_lines(path) == [] and path.read_bytes() == b""
