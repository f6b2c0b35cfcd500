"""Files that cannot be read among others that can, headers that state terabytes, an index that was damaged."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from hovle_jax.corpora import loading
from hovle_jax.corpora.converting import convert
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import BadEvent, BadSample, BadSamples
from hovle_jax.data.files import shard, shard_kinds
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.data.files.sources import open_source
from hovle_jax.errors import UserError
from hovle_jax.system.printable import printable
from hovle_jax.training.stages import STAGES
from tests import micro
from tests.source_files import answer, answers, image_file, quiet, rows, write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def parts(tmp_path):
    """Four files of 3 to 4 rows each -> (their pattern, the folder)."""
    for i in range(14):
        (tmp_path / f"{i}.png").write_bytes(image_file(i))
    for n in range(4):
        write_jsonl(tmp_path, rows()[4 * n : 4 * n + 4], f"part-{n}.jsonl")
    return str(tmp_path / "part-*.jsonl"), tmp_path


def damage(path, how):
    path.unlink()
    if how == "a folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")


def config_of(source, **changes):
    data = dict(source=str(source), batch_size=2, sequence_length=192, tiles=5, max_tiles=4, augment=True)
    return micro.run_config("instruct", data=data, **changes)


def dataset_of(config):
    corpus = loading.load_corpus(config, "train", quiet)
    return pipeline.build_dataset(config, STAGES["instruct"].batch, micro.tokenizer(), corpus)


@pytest.mark.parametrize("how", ["a folder", "a link without its file"])
def test_a_file_that_cannot_be_read_counts_as_what_the_others_hold(parts, how):
    pattern, folder = parts
    damage(folder / "part-1.jsonl", how)
    source = open_source(pattern)
    good = [i for i in range(len(source)) if i != 4]
    assert answers(source, good) == [answer(i) for i in (0, 1, 2, 3, 8, 9, 10, 11, 12, 13)]
    with pytest.raises(BadSample, match="unreadable_shard"):
        source[4]
    config = config_of(pattern)
    dataset = dataset_of(config)
    (event,) = dataset.summary.bad
    assert (event.reason, event.sample, event.samples) == ("unreadable_shard", "all of it", 3)
    assert event.shard.endswith("part-1.jsonl") and "part-1.jsonl" in event.detail
    batches = [batch for batch, _, _ in (next(made) for made in [dataset.iterate()] for _ in range(6))]
    again = dataset_of(config).iterate(3)  # resumed, by another process
    for batch in batches[3:]:
        resumed = next(again)[0]
        assert all((resumed[name] == batch[name]).all() for name in batch)


def test_the_ceiling_counts_what_a_file_may_have_held(tmp_path):
    event = BadEvent(-1, "s", "a.tar", "all of it", "unreadable_shard", "", samples=100)
    BadSamples(tmp_path, 0.02).start(0, [event], 9_901)
    with pytest.raises(UserError, match=r"100 of 10000 samples cannot.*unreadable_shard 100; most are in a.tar"):
        BadSamples(tmp_path, 0.005).start(0, [event], 9_901)


def test_a_corpus_is_made_of_the_files_that_can_be_read(parts, tmp_path):
    pattern, folder = parts
    damage(folder / "part-2.jsonl", "a folder")
    assert convert(pattern, tmp_path / "corpus", ceiling=1.0, say=quiet) == {"train": 10}


def test_of_files_none_of_which_can_be_read_the_first_is_named(parts):
    pattern, folder = parts
    for n in range(4):
        damage(folder / f"part-{n}.jsonl", "a folder")
    with pytest.raises(UserError, match="part-0.jsonl cannot be read: Is a directory"):
        open_source(pattern)


def test_a_file_that_is_lost_in_a_run_gives_its_places_to_the_next(tmp_path):
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    for n in range(3):
        writer = ArrayRecordWriter(str(tmp_path / f"train-{n:05d}-of-00003.array_record"), "group_size:1")
        for i in range(80):
            row = {"id": f"{n} {i}", "question": "what is it?", "answer": f"it is {n}"}
            writer.write(msgpack.packb(row))
        writer.close()
    dataset = dataset_of(config_of(tmp_path, bad_ceiling=1.0))
    (tmp_path / "train-00001-of-00003.array_record").write_bytes(b"")
    shard._readers._open.clear()
    events = [event for made in [dataset.iterate()] for _ in range(3) for event in next(made)[1]]
    lost = [event for event in events if "00001-of" in event.shard]
    assert lost == events and lost  # nothing else is missing
    assert {event.reason for event in lost} == {"unreadable_shard"}
    assert {event.replaced_by.split()[0] for event in lost} == {"2"}


# ---------------------------------------------------------------------------------------------------------------------
# Tar headers


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


GOOD = header("0.txt", 1) + b"a".ljust(512, b"\0")


@pytest.mark.parametrize("end", [
    header("1.txt", 2**40), header("1.txt", 2**62), header("1.txt", 2**63), header("1.txt", 2**80),
    header("x", 2**40, tarfile.GNUTYPE_LONGNAME), header("x", 2**62, tarfile.GNUTYPE_LONGLINK),
    header("x", 2**40, tarfile.XHDTYPE), header("x", 2**40, tarfile.XGLTYPE),
    (header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"a" * 512) * 3000, header("1.txt", -5),
])  # fmt: skip
def test_a_tar_header_that_lies_takes_no_memory(end, tmp_path):
    (tmp_path / "a.tar").write_bytes(GOOD + end)
    source = open_source(str(tmp_path / "a.tar"))
    assert source[0] == {"caption": "a"}
    assert len(source) > 1
    for i in range(1, len(source)):
        with pytest.raises(BadSample, match="truncated_shard|row_too_large"):
            source[i]


def test_a_tar_of_nothing_but_a_lie_is_none(tmp_path):
    (tmp_path / "a.tar").write_bytes(header("x", 2**40, tarfile.GNUTYPE_LONGNAME))
    with pytest.raises(UserError, match="a.tar cannot be read as a tar archive: a header of 1,099,511,627,776 bytes"):
        len(open_source(str(tmp_path / "a.tar")))


def test_names_in_a_tar_are_no_files_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tar", "w") as tar:
        for name in ("../../up.txt", "/etc/abs.txt", "a\x1b[2J/../x.txt", "link.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            if name == "link.txt":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(member, io.BytesIO(b"x"))
    source = open_source("a.tar")
    assert [source[i] for i in range(len(source))] == [{"caption": "x"}] * 3
    assert source.where(2)[1] == "a\\x1b[2J/../x"
    assert os.listdir() == ["a.tar"]


def test_members_and_lines_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_kinds, "LARGEST_ROW", 50)
    write_jsonl(tmp_path, [{"text": "a"}, {"text": "b" * 50}, {"text": "c"}])
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert [source[0], source[2]] == [{"text": "a"}, {"text": "c"}]
    with pytest.raises(BadSample, match="row_too_large: 62 bytes, and at most 50 are read"):
        source[1]


# ---------------------------------------------------------------------------------------------------------------------
# The cached index


def damaged(path, how):
    data = path.read_bytes()
    at = len(data) // 2
    changed = {"empty": b"", "half": data[:at], "flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped"])
@pytest.mark.parametrize("name", ["numbers.npy", "none.npy", "done"])
def test_a_damaged_index_is_built_anew(name, how, tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    arrays = {"numbers": np.arange(100), "none": np.zeros((0, 2), np.int64)}
    built = []

    def build():
        built.append(1)
        return arrays

    for _ in range(2):
        cached_arrays(["key"], build)
    assert len(built) == 1
    (path,) = tmp_path.rglob(name)
    damaged(path, how)
    for _ in range(2):
        found = cached_arrays(["key"], build)
        assert found.keys() == arrays.keys() and all((found[key] == arrays[key]).all() for key in arrays)
    assert len(built) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Text that is shown


def test_what_steers_a_terminal_is_shown_and_does_not_act(tmp_path):
    assert printable("a\x1b[2Jb\x9b\r\n\u202e\ud83d é🙂") == "a\\x1b[2Jb\\x9b\\r\\n\\u202e\\ud83d é🙂"
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    name = "\x1b]0;x\x07\n.jsonl"
    write_jsonl(tmp_path, [{"id": "\x1b[31m", "image": "\x1b[2J.png", "question": "a", "answer": "b"}], name)
    source = open_source(str(tmp_path / name))
    with pytest.raises(BadSample) as refused:
        source.record(0).image_bytes(0)
    event = source.event(0, refused.value.reason, refused.value.detail)
    assert "\x1b" not in f"{source.name}{event.source}{event.shard}{event.sample}{event.detail}"
    assert len(json.dumps(event.detail).splitlines()) == 1
    shutil.rmtree(tmp_path)
