"""Sources: each format gives its rows in any order; mixtures, plans and batches do not depend on how they are read."""

import concurrent.futures
import dataclasses
import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from hovle_jax.data import indexed, pipeline, sources, storage
from hovle_jax.data.bad import BadSample
from hovle_jax.data.chat import IMAGE_MARK
from hovle_jax.data.costs import costs_of
from hovle_jax.data.images import Tiling
from hovle_jax.data.mixture import open_mixture
from hovle_jax.data.packing import pack
from hovle_jax.data.records import Record, parse
from hovle_jax.data.samples import RecordSamples
from hovle_jax.data.sources import open_source
from hovle_jax.errors import UserError
from tests import broken, micro

COUNT = 14  # rows of each source below


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOVLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def quiet(line):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Sources of each kind, which hold the same


def answer(i):
    return f"it is number {i}" + " and so on" * (i % 3)


def picture(i):
    """Of different shapes, so that they have 1 to 5 tiles."""
    return broken.encoded(i, size=[(32, 32), (64, 32), (64, 64), (20, 70)][i % 4])


def rows():
    return [{"image": f"{i}.png", "conversations": broken.turns("<image>\nwhat is it?", answer(i))}
            for i in range(COUNT)]  # fmt: skip


def write_jsonl(folder, rows, name="rows.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def jsonl(folder):
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(picture(i))
    return write_jsonl(folder, rows())


def jsonl_shards(folder):
    """Three shards of unlike lengths, named by a range."""
    jsonl(folder)
    for n, part in enumerate((rows()[:3], rows()[3:4], rows()[4:])):
        write_jsonl(folder, part, f"part-{n:03d}.jsonl")
    return str(folder / "part-{000..002}.jsonl")


def tar_shards(folder):
    for shard, start in enumerate(range(0, COUNT, 5)):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for i in range(start, min(start + 5, COUNT)):
                text = json.dumps({"conversations": rows()[i]["conversations"]}).encode()
                for name, data in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "shard-*.tar")


def parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = [{"image": {"bytes": picture(i), "path": None}, "question": "what is it?", "answer": answer(i)}
             for i in range(COUNT)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet", row_group_size=4)
    return str(folder / "rows.parquet")


def array_record(folder):
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "train-00000-of-00001.array_record"), "group_size:1")
    for i, row in enumerate(rows()):
        writer.write(msgpack.packb(row | {"id": f"row {i}", "image": picture(i)}))
    writer.close()
    return str(folder)


def tfds(folder):
    builders = pytest.importorskip("tensorflow_datasets")

    with builders.core.registered.skip_registration():

        class Micro(builders.core.GeneratorBasedBuilder):
            VERSION = builders.core.Version("1.0.0")

            def _info(self):
                Text = builders.features.Text
                features = {
                    "image": builders.features.Image(encoding_format="png"),
                    "conversations": builders.features.Sequence({"from": Text(), "value": Text()}),
                }
                return builders.core.DatasetInfo(builder=self, features=builders.features.FeaturesDict(features))

            def _split_generators(self, download):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, row in enumerate(rows()):
                    yield i, row | {"image": io.BytesIO(picture(i))}

    builder = Micro(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def meta(folder):
    """All of them, each in a way of its own."""
    ways = {
        "jsonl": {"repeat_time": 2, "data_augment": True},
        "tar": {"repeat_time": 0.5, "max_dynamic_patch": 1, "data_augment": False},
    }
    described = {}
    for kind, write in ROWS.items():
        (folder / kind).mkdir()
        path = write(folder / kind)
        described[kind] = {"annotation": path, "root": kind if kind == "jsonl" else ""} | ways.get(kind, {})
    (folder / "meta.json").write_text(json.dumps(described))
    return str(folder / "meta.json")


def text(folder):
    (folder / "a.txt").write_text("".join(f"{answer(i)}, and that is all.\n" * 60 for i in range(60)))
    return str(folder / "*.txt")


ROWS = {"jsonl": jsonl, "jsonl_shards": jsonl_shards, "tar": tar_shards, "parquet": parquet,
        "array_record": array_record, "tfds": tfds}  # fmt: skip
ALL = {**ROWS, "meta": meta, "text": text}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> its path; written once."""
    paths = {}

    def get(kind):
        if kind not in paths:
            paths[kind] = ALL[kind](tmp_path_factory.mktemp(kind))
        return paths[kind]

    return get


def answers(source, order=None):
    return [parse(source[i], source.root).turns[0][1] for i in (range(len(source)) if order is None else order)]


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_the_same_in_any_order_from_threads_and_after_pickling(kind, made):
    source = open_source(made(kind))
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
    assert sizes == {picture(i) for i in range(COUNT)}


def test_a_lock_of_a_reader_does_not_wait_for_another(made):
    """Row groups are read while others are looked up, and evicted ones are read again."""
    source = open_source(made("parquet"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source[i % COUNT]["answer"], range(200)))
    assert got == [answer(i % COUNT) for i in range(200)]


def test_urls_are_read_as_files_are(made):
    import fsspec

    memory = fsspec.filesystem("memory")
    path = made("jsonl")
    for i in range(COUNT):
        memory.pipe(f"/corpus/{i}.png", picture(i))
    with open(path, "rb") as file:
        memory.pipe("/corpus/rows-0.jsonl", file.read())
    for pattern in ("memory://corpus/rows-0.jsonl", "memory://corpus/rows-*.jsonl", "memory://corpus/rows-{0..0}.jsonl",
                    f"file://{path}"):  # fmt: skip
        source = open_source(pattern)
        assert answers(source) == [answer(i) for i in range(COUNT)]
        assert parse(source[3], source.root).image_bytes(0) == picture(3)
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
    texts = ["x" * n for n in (0, 1, 40_000_000, 3)]
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
    assert (np.diff(spans) <= sources.TEXT_SPAN).all() and (np.diff(spans)[:-1] > sources.TEXT_SPAN // 2).all()
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
        "a/0.png": picture(0), "a/0.json": b'{"width": 32, "height": 32, "caption": "from json"}',
        "a/1.0.jpg": picture(1), "a/1.1.JPG": picture(2), "a/1.txt": "é".encode(),
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
    assert (first.images, first.sizes, first.caption) == ((picture(0),), ((32, 32),), "from json")
    assert (second.images, second.caption) == ((picture(1), picture(2)), "é")
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
    sources._readers._open.clear()  # as a new process
    with pytest.raises(UserError, match="cannot be read as an ArrayRecord file: it is cut off"):
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
    ("none.jsonl", "no file at .*none.jsonl; check data.source"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Rows as InternVL and others write them


def record(tmp_path=None, **row):
    return parse(row, "root")


def test_how_rows_say_where_pictures_and_marks_are():
    talk = broken.turns("<image>\nhi", "yes")
    assert record(image="a.png", conversations=talk).images == ("root/a.png",)
    assert record(image=["a.png", "/b.png"], conversations=broken.turns("hi", "yes")).images == ("root/a.png", "/b.png")
    assert record(image="", conversations=broken.turns("hi", "yes")).images == ()  # InternVL's rows of text alone
    assert record(video="", image="a.png", conversations=talk).images == ("root/a.png",)
    assert record(image={"bytes": b"x", "path": "a.png"}, conversations=talk).images == (b"x",)
    assert record(image="s3://b/a.png", conversations=talk).images == ("s3://b/a.png",)
    assert record(image="\ue000.png", conversations=talk).images == ("root/\ue000.png",)  # a name is not changed
    assert record(conversations=broken.turns("\ue000", "\uf8ff yes")).turns == (("\ue000", "\uf8ff yes"),)
    columns = {"from": ["human", "gpt"], "value": ["hi", "yes"]}
    assert record(conversations=columns).turns == (("hi", "yes"),)
    assert record(questions=["a", "b"], answers=["c", "d"]).turns == (("a", "c"), ("b", "d"))
    assert record(question="a", answers=["c", "d"]).turns == (("a", "c"),)
    parts = [{"type": "image"}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    assert record(image="a.png", messages=messages).turns == ((f"{IMAGE_MARK}\nhi", "yes"),)


@pytest.mark.parametrize("width, height, sizes", [
    (3, 4, ((3, 4),)), ([3], [4], ((3, 4),)), (3.0, 4, ()), (True, 4, ()), (0, 4, ()), (-3, -4, ()), (10**12, 1, ()),
    (10**400, 10**400, ()), (float("nan"), 4, ()), ("3", "4", ()), (None, 4, ()), ([3, 3], [4, 4], ()), ([], [], ()),
    (10**5, 10**5, ()),
])  # fmt: skip
def test_a_stated_size_counts_where_it_can_be_one(width, height, sizes):
    row = dict(image="a.png", conversations=broken.turns("<image>", "yes"))
    assert record(**row, width=width, height=height).sizes == sizes
    assert record(**row, width_list=width, height_list=height).sizes == sizes


def samples_of(stage="instruct", **data):
    data = {"sequence_length": 192, "tiles": 5, "max_tiles": 4, "augment": False} | data
    return RecordSamples.of(micro.run_config(stage, data=data), micro.tokenizer())


def learned(sample):
    return micro.tokenizer().decode(sample.tokens[sample.supervised], skip_special=False)


def shown(sample):
    return micro.tokenizer().decode(sample.tokens, skip_special=False).replace("<IMG_CONTEXT>", ".")


@pytest.mark.parametrize("row, expected", [
    (dict(image="", conversations=broken.turns("hi", "yes")), "user\nhi<|im_end|>"),
    (dict(image=[picture(0)], conversations=broken.turns("hi", "yes")), "user\n<img>....</img>\nhi<|im_end|>"),
    (dict(image=[picture(0)], conversations=broken.turns("a <image> b", "yes")), "user\na <img>....</img> b<|im_end|>"),
    (dict(image=[picture(0)] * 2, conversations=broken.turns("hi", "yes")),
     "user\n<img>....</img>\n<img>....</img>\nhi<|im_end|>"),
    (dict(image=[picture(0)] * 2, conversations=broken.turns("<image> or", "yes", "<image>?", "no")),
     "user\n<img>....</img> or<|im_end|><|im_start|>assistant\nyes<|im_end|><|im_start|>user\n<img>....</img>?"),
    (dict(conversations=[{"from": "system", "value": "be kind"}, *broken.turns("hi", "yes")]),
     "<s><|im_start|>system\nbe kind<|im_end|>"),
    (dict(image=[picture(0)] * 2, caption="a dog"), "user\n<img>....</img>\ndescribe the picture.<|im_end|>"),
])  # fmt: skip
def test_internvl_s_rules_for_conversations(row, expected):
    sample = samples_of().make(parse(row), np.random.default_rng(0))
    assert expected in shown(sample)
    assert learned(sample) in ("yes<|im_end|>", "yes<|im_end|>no<|im_end|>", "a dog<|im_end|>")
    assert len(sample.tiles) == shown(sample).count("<img>")


@pytest.mark.parametrize("images, tiles", [(1, 13), (2, 7), (3, 5), (5, 3), (12, 1), (40, 1)])
def test_several_images_share_the_tiles(images, tiles):
    assert Tiling(32, 1, 12, True).shared_by(images).count(400, 100 * 12 // max(12 // images, 1)) <= tiles
    sample = samples_of(sequence_length=4000, tiles=100, max_tiles=12)
    row = dict(image=[broken.encoded(0, size=(96, 72))] * images, conversations=broken.turns("hi", "yes"))
    made = sample.make(parse(row), np.random.default_rng(0))
    expected = Tiling(32, 1, max(1, 12 // images), True).count(96, 72)
    assert len(made.tiles) == min(images * expected, 100) and expected <= tiles


# ---------------------------------------------------------------------------------------------------------------------
# What a sample takes, and where it is cut


def random_record(rng, pictures):
    """Up to 5 pictures at random places of up to 4 turns of random lengths."""
    images = [pictures[k] for k in rng.integers(0, len(pictures), rng.integers(0, 6))]
    count = int(rng.integers(1, 5))
    words = lambda most: " ".join(["what"] * int(rng.integers(0, most)))
    questions = [[words(12)] for _ in range(count)]
    if images and rng.random() < 0.8:
        for _ in images:
            questions[rng.integers(count)].append(IMAGE_MARK + words(4))
    turns = tuple((" ".join(q), f"a{i} " + words(12)) for i, q in enumerate(questions))
    return Record(tuple(images), (), turns, "", "")


def test_what_is_cut_is_never_an_image_and_never_all_that_is_learned():
    """Also: what a sample needs is told without making it."""
    rng = np.random.default_rng(0)
    pictures = [broken.encoded(i, size=size) for i, size in enumerate([(32, 32), (70, 32), (33, 90), (64, 64), (9, 9)])]
    tokenizer, outcomes = micro.tokenizer(), {"whole": 0, "cut": 0, "refused": 0}
    start, end, image_id = (tokenizer.special(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>"))
    for _ in range(150):
        length, tiles = int(rng.integers(30, 200)), int(rng.integers(1, 12))
        samples = samples_of(sequence_length=length, tiles=tiles)
        record = random_record(rng, pictures)
        roomy = dataclasses.replace(samples, length=100_000, tiles=1000)
        whole, needs = roomy.make(record, rng), samples.needs(record)
        counts = [samples.tiling.shared_by(len(record.images)).count(w, h) for w, h in needs.sizes]
        assert len(whole.tokens) == needs.text + 4 * sum(counts) and len(whole.tiles) == sum(counts)
        first = needs.first + 4 * sum(counts[: needs.images_before])
        assert np.flatnonzero(whole.supervised)[0] == first - 1
        fits = first <= length and sum(counts[: needs.images_before]) <= tiles
        try:
            made = samples.make(record, rng)
        except BadSample as error:
            assert error.reason == "nothing_supervised" and not fits
            outcomes["refused"] += 1
            continue
        assert fits
        n = len(made.tokens)
        outcomes["whole" if n == len(whole.tokens) else "cut"] += 1
        assert n <= length and len(made.tiles) <= tiles and made.supervised.any()
        np.testing.assert_array_equal(made.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(made.supervised, whole.supervised[:n])
        np.testing.assert_array_equal(made.tiles, whole.tiles[: len(made.tiles)])
        assert (made.tokens == start).sum() == (made.tokens == end).sum()
        assert (made.tokens == image_id).sum() == 4 * len(made.tiles)
        assert not made.supervised[np.isin(made.tokens, (start, end, image_id))].any()
        answers = "".join(answer.strip() + "<|im_end|>" for _, answer in record.turns)
        assert answers.startswith(learned(made))
        if n < len(whole.tokens):  # as much as there is room for
            assert n == length or whole.tokens[n] == start
    assert min(outcomes.values()) > 10, outcomes


def test_parts_of_a_long_text_hold_each_token_once():
    samples = samples_of("pretrain", sequence_length=50)
    record = Record(text="a long text about nothing, " * 40)
    total = samples.needs(record).text
    parts = [samples.make(record, None, part).tokens for part in range(-(-(total - 1) // 49))]
    assert max(map(len, parts)) == 50 and all(a[-1] == b[0] for a, b in zip(parts, parts[1:]))
    assert sum(len(part) - 1 for part in parts) == total - 1
    with pytest.raises(BadSample, match="nothing_supervised"):
        samples.make(record, None, len(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Meta files


def write_meta(folder, **entries):
    (folder / "meta.json").write_text(json.dumps(entries))
    return str(folder / "meta.json")


def test_entries_of_a_meta_file(tmp_path):
    write_jsonl(tmp_path, rows())
    path = write_meta(
        tmp_path,
        half={"annotation": "rows.jsonl", "repeat_time": 0.5, "length": 7, "anything": 1},
        twice={"annotation": str(tmp_path / "rows.jsonl"), "root": "/pictures", "repeat_time": 2, "data_augment": True},
        more={"annotation": "rows.jsonl", "repeat_time": 1.25, "max_dynamic_patch": 6, "data_augment": False},
        little={"annotation": "rows.jsonl", "repeat_time": 0.001},
    )
    half, twice, more, little = open_mixture(path)
    assert half.copies().tolist() == [1] * 7 + [0] * 7  # the leading fraction
    assert twice.copies().tolist() == [2] * COUNT and more.copies().tolist() == [2] * 3 + [1] * 11
    assert little.copies().sum() == 1
    assert [e.augment for e in (half, twice, more)] == [None, True, False]
    assert [e.max_tiles for e in (half, twice, more)] == [None, None, 6]
    assert parse(twice.source[0], twice.source.root).images == ("/pictures/0.png",)
    assert parse(half.source[0], half.source.root).images == (str(tmp_path / "0.png"),)


def test_weights_are_shares_of_an_epoch_that_has_every_sample(tmp_path):
    write_jsonl(tmp_path, rows(), "small.jsonl")
    write_jsonl(tmp_path, rows() * 10, "large.jsonl")
    entry = lambda name, weight: {"annotation": f"{name}.jsonl", "weight": weight}
    entries = open_mixture(write_meta(tmp_path, small=entry("small", 0.75), large=entry("large", 0.25)))
    small, large = (entry.copies() for entry in entries)
    assert small.sum() == 3 * large.sum() and min(small.min(), large.min()) == 1


@pytest.mark.parametrize("entry, message", [
    ({"annotation": "rows.jsonl", "repeat_times": 2}, "unknown key 'repeat_times'; did you mean 'repeat_time'"),
    ({"annotation": "rows.jsonl", "repeat_time": "2"}, "'a' has repeat_time='2', which should be a number above 0"),
    ({"annotation": "rows.jsonl", "repeat_time": 0}, "repeat_time=0"),
    ({"annotation": "rows.jsonl", "repeat_time": float("nan")}, "repeat_time=nan"),
    ({"annotation": "rows.jsonl", "max_dynamic_patch": 0}, "max_dynamic_patch=0, which should be a number above 0"),
    ({"annotation": "rows.jsonl", "max_dynamic_patch": True}, "max_dynamic_patch=True"),
    ({"annotation": "rows.jsonl", "data_augment": "yes"}, "data_augment='yes', which should be true or false"),
    ({"annotation": "none.jsonl"}, "no file at .*none.jsonl"),
    ({"annotation": 5}, "is no meta file: each entry needs an 'annotation'"),
    ({"root": "x"}, "is no meta file: each entry needs an 'annotation'"),
    ([1], "is no meta file"),
])  # fmt: skip
def test_entries_that_cannot_be_understood(entry, message, tmp_path):
    write_jsonl(tmp_path, rows())
    with pytest.raises(UserError, match=message):
        open_mixture(write_meta(tmp_path, a=entry))


def test_meta_files_that_are_none(tmp_path):
    write_jsonl(tmp_path, rows())
    weighted = {"a": {"annotation": "rows.jsonl", "weight": 1}, "b": {"annotation": "rows.jsonl"}}
    with pytest.raises(UserError, match="'a' has a weight and others have none"):
        open_mixture(write_meta(tmp_path, **weighted))
    (tmp_path / "list.json").write_text(json.dumps(rows()))
    with pytest.raises(UserError, match="rows themselves belong in a .jsonl"):
        open_mixture(str(tmp_path / "list.json"))
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(UserError, match="cut.json cannot be read as JSON"):
        open_mixture(str(tmp_path / "cut.json"))
    with pytest.raises(UserError, match="2 more meta files are named"):
        open_mixture(str(tmp_path / "*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("seed", range(6))
def test_each_sample_is_in_one_row_within_both_budgets(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4000))
    tokens, tiles = rng.integers(1, 101, n), rng.integers(0, 9, n)
    most = int(rng.integers(0, 4))
    packing = pack(tokens, tiles, 100, 8, most)
    assert sorted(packing.members.tolist()) == list(range(n))
    for r in range(len(packing)):
        members = packing.row(r)
        assert tokens[members].sum() <= 100 and tiles[members].sum() <= 8
        assert len(members) and (not most or len(members) <= most)
    if not most:  # never worse by much than what a row must hold
        least = max(tokens.sum() / 100, tiles.sum() / 8)
        assert len(packing) < 1.35 * least + 2


def config_of(source, stage="instruct", **data):
    data = dict(source=source, batch_size=4, sequence_length=160, tiles=6, max_tiles=4, augment=True) | data
    return micro.run_config(stage, data=data)


def dataset_of(config, **more):
    return pipeline.build_dataset(config, micro.tokenizer(), pipeline.load_corpus(config, "train", quiet), **more)


def row_numbers(config, epochs):
    """Which of the planned rows come, epoch by epoch."""
    corpus = pipeline.load_corpus(config, "train", quiet)
    plan, *_ = corpus.planned(config, micro.tokenizer())
    rows, _ = corpus.rows(config, micro.tokenizer())
    seen = {}
    for r in range(len(plan)):
        seen[corpus.rows(config, micro.tokenizer(), held_out=True)[0][r].arrays["tokens"].tobytes()] = r
    return [[seen[rows[e * len(plan) + i].arrays["tokens"].tobytes()] for i in range(len(plan))] for e in range(epochs)]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(made):
    config = config_of(made("jsonl"))
    first, second = row_numbers(config, 2)
    assert sorted(first) == sorted(second) == list(range(len(first))) and first != second
    plans = []
    for seed in (0, 1):
        corpus = pipeline.load_corpus(config, "train", quiet)
        plan, made_of, events, _ = corpus.planned(dataclasses.replace(config, seed=seed), micro.tokenizer())
        assert sorted(plan.record.tolist()) == list(range(COUNT)) and not events
        assert made_of.samples == COUNT and 0.3 < made_of.token_fill <= 1
        plans.append(plan.record.tolist())
    assert plans[0] != plans[1]


def test_a_step_far_ahead_is_found_without_those_before(made, monkeypatch):
    dataset = dataset_of(config_of(made("jsonl")))
    reads = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda *args: reads.append(args) or read(*args))
    batch = dataset[1_000_000]
    assert batch["tokens"].shape == (4, 160) and len(reads) < 80
    assert (batch["loss_weights"] > 0).any(1).all()


def test_an_index_is_of_one_tokenizer_and_one_template(made):
    samples = samples_of()
    other = pipeline.train_tokenizer(
        micro.run_config("pretrain"), pipeline.load_corpus(config_of(made("text")), "train")
    )
    templated = type(other)(samples.tokenizer.model)
    templated.chat_template = "{{ messages[0]['content'] }}"
    keys = [samples.text_key()]
    keys += [
        dataclasses.replace(samples, **c).text_key()
        for c in ({"tokenizer": other}, {"system": "x"}, {"stage": "align"})
    ]
    assert keys[0] == keys[3] and keys[0] not in keys[1:3]
    assert dataclasses.replace(samples, tokenizer=templated)._vocabulary != samples._vocabulary
    assert samples_of(tiles=9, sequence_length=99).text_key() == keys[0]  # neither matters to the index


def test_an_index_made_by_processes_is_the_same(made, monkeypatch, tmp_path):
    source, samples = open_source(made("jsonl")), samples_of()
    alone = costs_of(source, samples, quiet)
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    monkeypatch.setattr("hovle_jax.data.costs.MANY", 0)
    monkeypatch.setattr("hovle_jax.data.costs.CHUNK", 5)
    shared = costs_of(source, samples, quiet, workers=1)
    for field in dataclasses.fields(alone):
        np.testing.assert_array_equal(getattr(alone, field.name), getattr(shared, field.name))


# ---------------------------------------------------------------------------------------------------------------------
# batch = f(seed, step)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


STAGES_OF = [*((kind, "instruct") for kind in ALL if kind != "text"), ("text", "pretrain"),
             ("meta", "distill"), ("tar", "contrast"), ("array_record", "align")]  # fmt: skip


@pytest.mark.parametrize("kind, stage", STAGES_OF)
def test_batches_do_not_depend_on_hosts_or_on_where_a_run_was_resumed(kind, stage, made):
    config = config_of(made(kind), stage)
    dataset = dataset_of(config)
    assert not dataset.found.bad
    expected = [batch for (batch, _, _), _ in zip(dataset.iterate(), range(6))]
    assert any((a != b).any() for a, b in zip(expected[0].values(), expected[1].values()))
    steps = np.random.default_rng(len(kind)).choice(6, 3, replace=False).tolist()
    for hosts in (1, 2, 4):
        parts = [dataset_of(config, numbers=numbers) for numbers in np.array_split(range(4), hosts)]
        for step in steps:
            made_by = [next(part.iterate(step))[0] for part in parts]
            assert_same(expected[step], {name: np.concatenate([p[name] for p in made_by]) for name in made_by[0]})
    assert_same(expected[steps[0]], dataset[steps[0]])


@pytest.mark.parametrize("kind, stage, hosts", [("meta", "instruct", 2), ("text", "pretrain", 1)])
def test_batches_do_not_depend_on_worker_processes(kind, stage, hosts, made):
    config = config_of(made(kind), stage)
    expected = dataset_of(config)
    rows = list(range(4))[(hosts - 1) * 4 // hosts :]
    part = dataset_of(config, numbers=rows).iterate(2, workers=2)
    for step in (2, 3, 4):
        assert_same({name: value[rows] for name, value in expected[step].items()}, next(part)[0])


def test_augmentation_is_what_the_entry_says_and_the_seed_draws(tmp_path):
    jsonl(tmp_path)
    entry = {"annotation": "rows.jsonl"}
    tiles = lambda **more: dataset_of(config_of(write_meta(tmp_path, a=entry | more), augment=False))[0]["tiles"]
    plain = tiles()
    changed = tiles(data_augment=True)
    assert plain.shape == changed.shape and (plain != changed).any()
    np.testing.assert_array_equal(tiles(data_augment=True), changed)
    np.testing.assert_array_equal(tiles(data_augment=False), plain)
    held_out = dataset_of(config_of(write_meta(tmp_path, a=entry | {"data_augment": True})), held_out=True)[0]
    assert any(
        (held_out["tiles"][0, 0] == Tiling(32, 1, 4).cut(image)[0]).all() for image in map(decoded, range(COUNT))
    )


def decoded(i):
    from hovle_jax.data.images import decode_image

    return decode_image(picture(i))


def test_an_entry_s_own_number_of_tiles_is_planned_with(tmp_path):
    jsonl(tmp_path)
    entries = {"few": {"annotation": "rows.jsonl", "max_dynamic_patch": 1}, "many": {"annotation": "rows.jsonl"}}
    config = config_of(write_meta(tmp_path, **entries))
    plan, *_ = pipeline.load_corpus(config, "train", quiet).planned(config, micro.tokenizer())
    assert set(plan.tiles[plan.entry == 0].tolist()) == {1} and max(plan.tiles[plan.entry == 1].tolist()) == 5
    batches = dataset_of(config).iterate()
    assert not any(events for _, events, _ in (next(batches) for _ in range(4)))


def test_a_plan_is_the_same_in_another_process(made):
    config = config_of(made("jsonl"))
    plan, *_ = pipeline.load_corpus(config, "train", quiet).planned(config, micro.tokenizer())
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.row(r) for r in range(len(copy))] == [plan.row(r) for r in range(len(plan))]
    assert indexed.Plan(plan.key).key == plan.key
