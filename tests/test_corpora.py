"""Corpora made of packages, on archives made here; nothing is fetched. The real ones are read where they lie ready."""

import hashlib
import io
import json
import lzma
import pathlib
import subprocess
import tarfile
import types
import zipfile

import msgpack
import pytest
from PIL import Image

from hovle_jax import corpora
from hovle_jax.corpora import emoji, packages, questions, tuxpaint, writing
from hovle_jax.corpora.packages import Package, fetch, members
from hovle_jax.errors import UserError
from hovle_jax.system.cache import cache_dir

FILES = {"package/a.txt": b"first", "package/folder/b.bin": bytes(range(256)) * 40}


def tar_bytes(files, prefix=""):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in files.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def write_tgz(path, files):
    with tarfile.open(path, "w:gz") as file:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def write_deb(path, files):
    """Members of an odd length, so that a reader has to know about the padding."""
    control = b"odd"
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": control}
    parts["data.tar.xz"] = lzma.compress(tar_bytes(files, "./"))
    data = b"!<arch>\n"
    for name, content in parts.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    path.write_bytes(data)
    return path


WRITERS = {".tgz": write_tgz, ".whl": write_zip, ".deb": write_deb}


def image_file(color, size=(8, 8), form="PNG"):
    stream = io.BytesIO()
    Image.new("RGBA", size, color).save(stream, form, lossless=True)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", WRITERS)
def test_members(suffix, tmp_path):
    archive = WRITERS[suffix](tmp_path / f"x{suffix}", FILES)
    assert dict(members(archive)) == FILES
    assert [name for name, _ in members(archive, lambda name: name.endswith(".txt"))] == ["package/a.txt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", WRITERS)
def test_archives_cut_short_say_so(suffix, share, tmp_path):
    archive = WRITERS[suffix](tmp_path / f"x{suffix}", FILES)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=f"x{suffix} is damaged or truncated"):
        dict(members(archive))


def test_a_deb_whose_content_is_cut_short_says_so(tmp_path):
    """The outer archive is whole, and the compressed stream in it ends early."""
    content = lzma.compress(tar_bytes(FILES))[:-40]
    header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    (tmp_path / "x.deb").write_bytes(b"!<arch>\n" + header + content)
    with pytest.raises(UserError, match="damaged or truncated"):
        dict(members(tmp_path / "x.deb"))


def test_fetch_takes_the_pinned_archive_only(tmp_path, monkeypatch):
    content, commands = b"an archive", []

    def run(command, cwd, **_):
        commands.append(command)
        (pathlib.Path(cwd) / "thing-1.2.tgz").write_bytes(content)
        return types.SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    package = Package("npm", "@some/thing", "1.2", hashlib.sha256(content).hexdigest(), "MIT", 1)
    archive = fetch(package, tmp_path)
    assert archive.read_bytes() == content and tmp_path in archive.parents
    assert commands[0][:2] == ["npm", "pack"] and commands[0][-1] == "@some/thing@1.2"
    content = b"another"
    with pytest.raises(UserError, match=r"thing-1.2.tgz of @some/thing@1.2 has sha256 \w{64}, not the pinned"):
        fetch(package, tmp_path)


@pytest.mark.parametrize("manager, requirement", [("npm", "x@1"), ("pip", "x==1"), ("apt", "x=1")])
def test_fetch_says_what_went_wrong(manager, requirement, tmp_path, monkeypatch):
    stderr = "npm error code E404\nERROR: no such thing\nnpm error in full\n"
    failed = types.SimpleNamespace(returncode=1, stderr=stderr, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=rf"^{requirement} cannot be fetched \(ERROR: no such thing\); .+$"):
        fetch(Package(manager, "x", "1", "", "MIT", 1), tmp_path)


@pytest.mark.parametrize("manager", ["npm", "apt"])
def test_fetch_says_which_tool_is_missing(manager, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"needs {manager}, which is missing; .+"):
        fetch(Package(manager, "x", "1", "", "MIT", 1), tmp_path)


def test_a_missing_rasteriser_is_known_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    monkeypatch.setattr(corpora, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r'pip install "hovle_jax\[corpora\]"'):
        corpora.prepare("emoji", say=lambda _: None)


def test_captions_in_many_languages():
    text = "A  cat.\r\nde.utf8=Eine Katze.\npt_BR.utf8=Um  gato = bicho. \n"
    text += "ja.utf8=ねこ\nxx.utf8=\nnonsense\nsr@latin.utf8=Mačka.\n"
    english, captions = tuxpaint.parse_captions(b"\xef\xbb\xbf" + text.encode())
    assert english == "A cat."
    assert captions == {"de": "Eine Katze.", "pt_BR": "Um gato = bicho.", "ja": "ねこ", "sr@latin": "Mačka."}
    assert tuxpaint.parse_captions(b"") == ("", {})


def test_choices_depend_on_the_name_alone():
    names = [f"name {i}" for i in range(4000)]
    held_out = [name for name in names if questions.is_held_out(name)]
    assert held_out == [name for name in reversed(names) if questions.is_held_out(name)][::-1]
    assert 0.08 < len(held_out) / len(names) < 0.12
    assert questions.fraction("a", "b") != questions.fraction("ab")
    assert questions.fraction("x") == pytest.approx(0.177506819)  # on every machine


def test_a_translation_is_in_a_language_with_a_name_and_is_not_english():
    assert questions.pick_translation("Iris", {"de": "iris", "tlh": "xyz", "en_GB": "Flag"}, "k") is None
    assert questions.pick_translation("cat", {"de": "Katze", "fr": "cat"}, "k") == ("German", "Katze")
    known = {questions.pick_translation("cat", {"de": "Katze", "zh_TW": "貓"}, str(i))[0] for i in range(20)}
    assert known == {"German", "Traditional Chinese"}


def test_a_conversation_shows_the_image_first_and_starts_with_each_question():
    pairs = [("a?", "1"), ("b?", "2"), ("c?", "3")]
    firsts = set()
    for i in range(30):
        turns = questions.conversation(pairs, str(i))
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 3
        assert [turn["value"].count("<image>") for turn in turns] == [1, 0, 0, 0, 0, 0]
        firsts.add(turns[0]["value"])
    assert firsts == {"<image>\na?", "<image>\nb?", "<image>\nc?"}


def stamps_deb(path, count=40):
    """Stamps in two folders, and what is to be left out: letters, a mirrored stamp, an image a second time."""
    stamps = {}
    for i in range(count):
        name = f"animals/birds/cartoon/bird{i}"
        stamps[f"{name}.png"] = image_file((i, 200, 100, 255 if i else 0), (10 + i, 20))
        stamps[f"{name}.txt"] = f"Bird {i}.\nde.utf8=Vogel {i}.\nfr.utf8=Oiseau {i}.\n".encode()
    stamps["symbols/alphabets/a.png"], stamps["symbols/alphabets/a.txt"] = image_file("red"), b"A."
    stamps["animals/birds/cartoon/bird1_mirror.png"] = image_file("blue")
    stamps["space/again.png"], stamps["space/again.txt"] = stamps["animals/birds/cartoon/bird7.png"], b"Again."
    return write_deb(path, {f"usr/share/tuxpaint/stamps/{name}": data for name, data in stamps.items()})


def emoji_archives(folder, count=60):
    """Emoji of one group, of which the first is in three styles only, and the last two look alike in one."""
    codes = [f"1F{600 + i}" for i in range(count)]
    entries = [
        {"hexcode": code, "label": f"thing {i}", "emoji": "x", "order": i, "group": 0, "subgroup": 0, "tags": ["t"]}
        for i, code in enumerate(codes)
    ]
    part = {"hexcode": "1F3FB", "label": "light skin tone", "emoji": "x", "order": 0, "group": 1, "subgroup": 0}
    german = [{"hexcode": entry["hexcode"], "label": "Ding " + entry["label"][6:]} for entry in entries]
    messages = {"groups": [{"key": "g", "message": "things"}], "subgroups": [{"key": "s", "message": "small things"}]}
    places = {"groups": {"0": "g", "1": "component"}, "subgroups": {"0": "s"}}
    names = {"en/data.json": [part, *entries], "de/data.json": german, "en/messages.json": messages}
    names["meta/groups.json"] = places
    files = {f"package/{name}": json.dumps(value).encode() for name, value in names.items()}
    archives = {emoji.NAMES.name: write_tgz(folder / "names.tgz", files)}
    for number, (style, (package, (inner, ending))) in enumerate(emoji.STYLES.items()):
        files = {}
        for i, code in enumerate(codes if style != "google" else codes[1:]):
            color = (i if (style, i) != ("openmoji", count - 1) else i - 1, 50 * number, 7)
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt" id="x{i}">'
            svg += f'<rect width="12" height="12" fill="rgb{color}"/></svg>'
            data = svg.encode() if ending == ".svg" else image_file(color, form=ending[1:])
            files[inner + (code if style == "openmoji" else code.lower() + "-fe0f") + ending] = data
        suffix = packages.MANAGERS[package.manager].suffix
        archives[package.name] = WRITERS[suffix](folder / f"{style}{suffix}", files)
    return archives


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The corpora with packages of a few images; -> the names of those that were fetched."""
    pytest.importorskip("resvg_py")
    archives = {tuxpaint.PACKAGE.name: stamps_deb(tmp_path / "stamps.deb"), **emoji_archives(tmp_path)}
    fetched = []
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "fetch", lambda package, _: fetched.append(package.name) or archives[package.name])
    return fetched


def read(folder, split):
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(folder / writing.shard_name(split)))
    return [msgpack.unpackb(record) for record in reader.read_all()]


def check_row(row):
    image = Image.open(io.BytesIO(row["image"]))
    assert image.mode == "RGB" and image.size == (row["width"], row["height"])
    assert isinstance(row["id"], str) and row["caption"]
    values = [turn["value"] for turn in row["conversations"]]
    assert all(values) and values[0].startswith("<image>\n") and "<image>" not in "".join(values[1:])
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(values) // 2)
    assert len(values) in (4, 6) and row["caption"] in values[1::2]


def test_tuxpaint(packaged):
    folder = corpora.prepare("tuxpaint", say=lambda _: None)
    rows = {split: read(folder, split) for split in ("train", "test")}
    ids = {split: {row["id"] for row in rows[split]} for split in rows}
    assert ids["train"] | ids["test"] == {f"animals/birds/cartoon/bird{i}" for i in range(40)}
    assert not ids["train"] & ids["test"] and ids["test"]
    by_id = {row["id"]: row for split in rows.values() for row in split}
    for row in by_id.values():
        check_row(row)
    row = by_id["animals/birds/cartoon/bird0"]
    assert (row["width"], row["height"], row["caption"]) == (10, 20, "Bird 0.")
    assert row["captions"] == {"de": "Vogel 0.", "fr": "Oiseau 0."}
    assert (row["category"], row["manner"]) == (["animals", "birds"], ["cartoon"])
    assert Image.open(io.BytesIO(row["image"])).getpixel((3, 3)) == (255, 255, 255)  # it is transparent
    about = json.loads((folder / "dataset.json").read_text())
    assert about["splits"]["train"]["rows"] == len(rows["train"]) and about["packages"][0]["licence"] == "GPL-2"


def test_emoji(packaged):
    folder = corpora.prepare("emoji", say=lambda _: None)
    rows = {split: read(folder, split) for split in ("train", "test_concept", "test_style", "test_both")}
    for row in (row for split in rows.values() for row in split):
        check_row(row)
        number = row["caption"].split()[1]
        assert row["captions"] == [row["caption"], f"{row['caption']}, t", "things", f"things: {row['subgroup']}"]
        assert row["labels"] == {"de": f"Ding {number}"} and row["group"] == "things" and row["tags"] == ["t"]
    concepts = {split: {row["concept"] for row in rows[split]} for split in rows}
    styles = {split: {row["style"] for row in rows[split]} for split in rows}
    assert concepts["train"] == concepts["test_style"] and concepts["test_concept"] == concepts["test_both"]
    assert not concepts["train"] & concepts["test_concept"] and concepts["test_concept"]
    assert styles["train"] == styles["test_concept"] == set(emoji.STYLES) - {emoji.TEST_STYLE}
    assert styles["test_style"] == styles["test_both"] == {emoji.TEST_STYLE}
    assert concepts["train"] | concepts["test_concept"] == {f"1F{600 + i}" for i in range(1, 59)}
    held_out = {row["caption"] for row in rows["test_concept"]}
    told = " ".join(turn["value"] + " " for row in rows["train"] for turn in row["conversations"]).replace('"', " ")
    assert not any(
        f"{name} " in told for name in held_out
    )  # no name of a test is told in training, not even as a wrong one
    row = next(row for row in rows["train"] if row["style"] == "fluent")
    expected = (int(row["concept"][2:]) - 600, 50, 7)
    found = Image.open(io.BytesIO(row["image"])).getpixel((64, 64))
    assert max(abs(a - b) for a, b in zip(expected, found)) <= 4


def test_a_second_call_finds_it_ready_and_two_preparations_are_equal(packaged, tmp_path, monkeypatch):
    first = corpora.prepare("emoji", say=lambda _: None)
    assert len(packaged) == 5
    assert corpora.prepare("emoji", say=pytest.fail) == first and len(packaged) == 5
    assert sorted(path.name for path in first.parent.iterdir()) == [".lock", first.name]  # no archive stays
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "another"))
    second = corpora.prepare("emoji", say=lambda _: None)
    assert second != first and (second / "dataset.json").read_bytes() == (first / "dataset.json").read_bytes()
    for split in ("train", "test_both"):
        assert read(first, split) == read(second, split)


def test_a_corpus_appears_whole_or_not_at_all(packaged, monkeypatch):
    monkeypatch.setattr(tuxpaint, "draw", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpora.prepare("tuxpaint", say=lambda _: None)
    assert [path.name for path in cache_dir("corpora").iterdir()] == [".lock"]


def test_write_corpus_refuses_two_rows_of_one_id(tmp_path):
    with pytest.raises(ValueError, match="two rows have the id a"):
        writing.write_corpus(tmp_path / "x", "x", {"train": [{"id": "a"}, {"id": "a"}]}, {})
    assert not list(tmp_path.iterdir())


def test_records_can_be_read_in_any_order(tmp_path):
    import grain

    rows = [{"id": str(i), "image": [bytes([i])] * i} for i in range(20)]
    writing.write_corpus(tmp_path / "x", "x", {"train": rows}, {})
    source = grain.sources.ArrayRecordDataSource([str(tmp_path / "x" / writing.shard_name("train"))])
    assert len(source) == 20 and [msgpack.unpackb(source[i]) for i in (7, 0, 19)] == [rows[7], rows[0], rows[19]]


def test_an_unknown_corpus_is_named():
    with pytest.raises(UserError, match="no corpus 'x'; use one of emoji, tuxpaint"):
        corpora.prepare("x")


@pytest.mark.parametrize("name, splits", [("emoji", 4), ("tuxpaint", 2)])
def test_the_real_corpus(name, splits):
    folder = cache_dir("corpora") / f"{name}-{corpora.CORPORA[name].version}"
    if not writing.is_written(folder):
        pytest.skip(f"fetch it once: python -m hovle_jax.prepare {name}")
    about = json.loads((folder / "dataset.json").read_text())
    assert len(about["splits"]) == splits
    captions_of = {}
    for split, said in about["splits"].items():
        rows = read(folder, split)
        assert len(rows) == said["rows"]
        assert hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest() == said["ids_sha256"]
        for row in rows:
            check_row(row)
            assert captions_of.setdefault(row["image"], row["caption"]) == row["caption"]  # no image with two names
    total = sum(said["rows"] for said in about["splits"].values())
    assert total == {"emoji": 4 * 1827, "tuxpaint": 791}[name]
