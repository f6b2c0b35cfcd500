"""Sources: each kind of file gives its rows in any order, and says what is broken."""

import concurrent.futures
import io
import pickle
import tarfile

import numpy as np
import pytest

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import shard, shard_kinds, storage
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.records import parse
from hovle_jax.data.files.sources import open_source
from hovle_jax.errors import UserError
from tests.source_files import COUNT, ROWS, answer, answers, array_record, image_file, write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_the_same_in_any_order_from_threads_and_after_pickling(kind, path_of):
    source = open_source(path_of(kind))
    assert len(source) == COUNT
    expected = answers(source)
    # TFDS has an order of its own.
    assert (sorted(expected) if kind == "tfds" else expected) == (sorted if kind == "tfds" else list)(
        [answer(i) for i in range(COUNT)]
    )
    order = np.random.default_rng(0).permutation(COUNT).tolist() * 4
    copy = pickle.loads(pickle.dumps(source))
    for other in (source, copy):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: answers(source, [i])[0], order)) == [expected[i] for i in order]
        assert [other.where(i) for i in range(COUNT)] == [source.where(i) for i in range(COUNT)]
    assert len({source.where(i) for i in range(COUNT)}) == COUNT  # names tell samples apart
    sizes = {parse(source[i], source.root).image_bytes(0) for i in range(COUNT)}
    assert sizes == {image_file(i) for i in range(COUNT)}


def test_a_lock_of_a_reader_does_not_wait_for_another(path_of):
    """Row groups are read while others are looked up, and evicted ones are read again."""
    source = open_source(path_of("parquet"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source[i % COUNT]["answer"], range(200)))
    assert got == [answer(i % COUNT) for i in range(200)]


def test_urls_are_read_as_files_are(path_of):
    import fsspec

    memory = fsspec.filesystem("memory")
    path = path_of("jsonl")
    for i in range(COUNT):
        memory.pipe(f"/corpus/{i}.png", image_file(i))
    with open(path, "rb") as file:
        memory.pipe("/corpus/rows-0.jsonl", file.read())
    for pattern in ("memory://corpus/rows-0.jsonl", "memory://corpus/rows-*.jsonl", "memory://corpus/rows-{0..0}.jsonl",
                    f"file://{path}"):  # fmt: skip
        source = open_source(pattern)
        assert answers(source) == [answer(i) for i in range(COUNT)]
        assert parse(source[3], source.root).image_bytes(0) == image_file(3)
    with pytest.raises(BadSample, match="missing_file"):
        storage.read("memory://corpus/none.png")
    with pytest.raises(UserError, match="no file at memory://corpus/none"):
        open_source("memory://corpus/none-*.jsonl")
    with pytest.raises(UserError, match="nosuch://a.jsonl cannot be opened"):
        open_source("nosuch://a.jsonl")


def test_lines_end_and_begin_as_people_write_them(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "with a byte order mark"}\r\n',
        b"\r\n",
        b"   \n",
        b'{"text": "b", "width": NaN}\n\n',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines) + b'{"text": "no end of line"}')
    source = open_source(str(tmp_path / "a.jsonl"))
    assert [source[i]["text"] for i in range(len(source))] == ["with a byte order mark", "b", "no end of line"]


def test_lines_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    texts = ["x" * n for n in (0, 1, 30_000_000, 3)]
    write_jsonl(tmp_path, [{"text": text} for text in texts])
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert [len(source[i]["text"]) for i in range(4)] == [len(text) for text in texts]


@pytest.mark.parametrize("data", [
    "é🙂\n".encode() * 40_000, "🙂".encode() * 40_000, b"\x80" * 300_000, b"a" * 65_536, b"a" * 65_537, b"\n" * 70_000,
])  # fmt: skip
def test_plain_text_is_cut_into_spans_that_are_whole(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    (shard,) = open_source(str(tmp_path / "a.txt")).shards
    spans = np.asarray(shard.spans)
    assert spans[0, 0] == 0 and spans[-1, 1] == len(data) and (spans[1:, 0] == spans[:-1, 1]).all()
    assert (np.diff(spans) <= shard_kinds.TEXT_SPAN).all() and (np.diff(spans)[:-1] > shard_kinds.TEXT_SPAN // 2).all()
    if data[0] != 0x80:
        assert "".join(shard.row(i)["text"] for i in range(len(shard))).encode() == data


def test_a_tar_that_breaks_off_gives_what_is_whole_and_reports_the_rest(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for i in range(6):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes([65 + i]) * 700))
    data = (tmp_path / "whole.tar").read_bytes()
    header, each = 512, 512 + 1024
    damaged = {
        "in_data": data[: 3 * each + header + 100],
        "in_header": data[: 3 * each + 100],
        "between_members": data[: 3 * each],
        "broken_header": data[: 3 * each] + b"x" * 200 + data[3 * each + 200 :],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        source = open_source(str(tmp_path / f"{name}.tar"))
        outcomes = []
        for i in range(len(source)):
            try:
                outcomes.append(source[i]["caption"][0])
            except BadSample as error:
                outcomes.append(error.reason)
        assert outcomes[:3] == ["A", "B", "C"] and set(outcomes[3:]) == {"truncated_shard"}, name
    assert len(open_source(str(tmp_path / "whole.tar"))) == 6


def test_members_of_a_tar_that_share_a_name_are_a_row(tmp_path):
    members = {
        "a/0.png": image_file(0), "a/0.json": b'{"width": 32, "height": 32, "caption": "from json"}',
        "a/1.0.jpg": image_file(1), "a/1.1.JPG": image_file(2), "a/1.txt": "é".encode(),
        "b/1.txt": b"another folder", "b/1.cls": b"3",
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"))
    assert [source.where(i)[1] for i in range(len(source))] == ["a/0", "a/1", "b/1"]
    first, second, third = (parse(source[i]) for i in range(3))
    assert (first.images, first.sizes, first.caption) == ((image_file(0),), ((32, 32),), "from json")
    assert (second.images, second.caption) == ((image_file(1), image_file(2)), "é")
    assert third.caption == "another folder"


def test_a_damaged_array_record_is_named(tmp_path):
    """A cut file has no record at all that can be found, so it must not pass for an empty one."""
    path = array_record(tmp_path) + "/train-00000-of-00001.array_record"
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data.replace(answer(3).encode(), answer(9).encode(), 1))
    source = open_source(path)
    with pytest.raises(BadSample, match="broken_record"):
        source[3]
    assert answers(source, [2, 4]) == [answer(2), answer(4)] and source.where(3)[1] == "3"
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    shard._readers._open.clear()  # as a new process
    with pytest.raises(UserError, match="cannot be read as an ArrayRecord file: it is truncated"):
        len(open_source(path))


def test_parquet_texts_that_are_no_utf8_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"b\xe9d", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source[0] == {"text": "good"} and source[2] == {"text": "fine"}
    with pytest.raises(BadSample, match="not_utf8"):
        source[1]


def unreadable(folder):
    (folder / "a.csv").write_text("x")
    (folder / "a.tar").write_bytes(b"no tar" * 300)
    (folder / "a.parquet").write_bytes(b"no parquet")
    (folder / "a.array_record").write_bytes(b"no records")
    (folder / "empty.jsonl").write_text("\n \n")
    (folder / "folder").mkdir()
    (folder / "splits").mkdir()
    (folder / "splits" / "test-00000-of-00001.array_record").write_bytes(b"")


@pytest.mark.parametrize("pattern, message", [
    ("a.csv", r"a.csv: a source is one of .jsonl, .*, a meta .json, or the name of a corpus"),
    ("none.jsonl", "no file at .*none.jsonl; check the path"),
    ("none-*.tar", "no file at .*none-"),
    ("none-{0..2}.tar", "no file at .*none-0.tar"),
    ("none-{2..0}.tar", "the range {2..0} is empty; the smaller number comes first"),
    ("a.tar", "a.tar cannot be read as a tar archive"),
    ("a.parquet", "a.parquet cannot be read as a Parquet file"),
    ("a.array_record", "a.array_record cannot be read as an ArrayRecord file"),
    ("empty.jsonl", "empty.jsonl has no samples"),
    ("folder", "name its files with a pattern, for example '.*/folder/"),
    ("splits", "has no split 'train'; it has test; .*splits:test names one"),
])  # fmt: skip
def test_what_cannot_be_a_source_says_so(pattern, message, tmp_path):
    if pattern.endswith("parquet"):
        pytest.importorskip("pyarrow")
    unreadable(tmp_path)
    with pytest.raises(UserError, match=message):
        open_mixture(f"{tmp_path}/{pattern}")
