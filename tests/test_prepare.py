"""prepare: users' data as a corpus, and a look at what a stage reads."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hovle_jax.corpora.converting import convert
from hovle_jax.corpora.writing import CorpusWriter
from hovle_jax.data.bad_samples import read_bad_samples
from hovle_jax.data.files.sources import open_source
from hovle_jax.errors import UserError
from tests import micro
from tests.test_commands import command

CONVERSATION = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}]


def png(index):
    buffer = io.BytesIO()
    pixels = np.roll(micro.draw("red", "circle"), index, axis=0)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """40 rows in a folder with their images."""
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    made = []
    for i in range(40):
        (folder / f"{i}.png").write_bytes(png(i))
        made.append({"id": i, "image": f"{i}.png", "conversations": CONVERSATION})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def ids(folder, split):
    source = open_source(folder, split=split)
    return {source[i]["id"] for i in range(len(source))}


def test_a_jsonl_becomes_a_corpus_with_its_images_inside(rows, tmp_path):
    counts = convert(rows / "rows.jsonl", tmp_path / "corpus", held_out=0.25)
    assert sum(counts.values()) == 40 and 3 <= counts["test"] <= 17
    train, test = ids(tmp_path / "corpus", "train"), ids(tmp_path / "corpus", "test")
    assert not train & test and train | test == {f"rows/{i}" for i in range(40)}
    row = open_source(tmp_path / "corpus")[0]
    number = int(row["id"].split("/")[1])
    assert row["image"] == [png(number)] and row["conversations"] == CONVERSATION
    assert (row["width"], row["height"]) == ([micro.SIZE], [micro.SIZE])
    described = json.loads((tmp_path / "corpus" / "dataset.json").read_text())["splits"]
    assert {split: values["rows"] for split, values in described.items()} == counts
    again = convert(rows / "rows.jsonl", tmp_path / "again", held_out=0.25)
    assert again == counts and ids(tmp_path / "again", "test") == test


def test_a_json_list_is_read_as_rows(rows, tmp_path):
    lines = (rows / "rows.jsonl").read_text().splitlines()
    (rows / "list.json").write_text(f"[{','.join(lines)}]")
    assert convert(rows / "list.json", tmp_path / "corpus") == {"train": 40}
    assert open_source(tmp_path / "corpus")[39]["image"] == [png(39)]
    (rows / "list.json").write_text("[{")
    with pytest.raises(UserError, match="list.json cannot be read as JSON"):
        convert(rows / "list.json", tmp_path / "other")


def test_a_tar_of_captioned_images_becomes_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(5):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", f"circle {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert convert(str(tmp_path / "{00000..00000}.tar"), tmp_path / "corpus") == {"train": 5}
    row = open_source(tmp_path / "corpus")[3]
    assert row["caption"] == "circle 3" and row["image"] == [png(3)] and "conversations" not in row


def test_bad_samples_are_left_out_and_listed(rows, tmp_path):
    (rows / "7.png").write_bytes(png(7)[:60])
    (rows / "9.png").unlink()
    assert convert(rows / "rows.jsonl", tmp_path / "corpus") == {"train": 38}
    reasons = {event.reason for event in read_bad_samples(tmp_path / "corpus")}
    assert reasons == {"truncated_image", "missing_image"}
    for i in range(12):
        (rows / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="bad_ceiling=0.01 allows: missing_image"):
        convert(rows / "rows.jsonl", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    few = command("prepare", "preview", "--config", "configs/instruct.py", f"--config.data.source={tmp_path}/corpus")
    assert few.returncode == 2 and "tokenizer.vocab_size=512" in few.stderr and "Traceback" not in few.stderr
    with pytest.raises(UserError, match="no file at"):
        convert(tmp_path / "absent.jsonl", tmp_path / "other")
    with pytest.raises(UserError, match="held_out=1.0 is a share"):
        convert(rows / "rows.jsonl", tmp_path / "other", held_out=1.0)


def test_a_large_corpus_has_several_files(tmp_path):
    with CorpusWriter(tmp_path, shard_bytes=300) as writer:
        for i in range(10):
            writer.add("train", {"id": str(i), "text": "x" * 100})
    files = [file["file"] for file in writer.splits["train"]["files"]]
    assert files == sorted(path.name for path in tmp_path.iterdir()) and len(files) > 2
    source = open_source(tmp_path)
    assert [source[i]["id"] for i in range(len(source))] == [str(i) for i in range(10)]


MISTAKES = {
    "no action": ("", "usage: python -m hovle_jax.prepare emoji"),
    "too few arguments": ("jsonl TMP/data/rows.jsonl", "jsonl takes 2 arguments"),
    "no config": ("preview", "--config is missing"),
    "absent source": ("webdataset TMP/absent.tar TMP/x", "no file at TMP/absent.tar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, rows):
    text, expected = MISTAKES[name]
    result = command("prepare", *text.replace("TMP", str(rows.parent)).split())
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and expected.replace("TMP", str(rows.parent)) in lines[0], result.stderr
    assert result.returncode == 2


@pytest.mark.slow
def test_the_commands(rows, tmp_path):
    """From a jsonl to a corpus, its preview and its speed."""
    corpus = tmp_path / "corpus"
    made = command("prepare", "jsonl", rows / "rows.jsonl", corpus, "--held_out", "0.1")
    assert made.returncode == 0 and f"{corpus}: train" in made.stdout, made.stderr
    shape = ["--config.data.sequence_length=128", "--config.data.tiles=4", "--config.data.batch_size=4"]
    shape += ["--config.tokenizer.vocab_size=300"]
    reads = ["--config", "configs/instruct.py", f"--config.data.source={corpus}", *shape]
    shown = command("prepare", "preview", *reads, "--out", tmp_path / "look", "--json")
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout.splitlines()[-1])
    assert 0 < facts["mean token fill of a row"] <= 1 and facts["mean tiles of a sample"] == 1, shown.stderr
    assert facts["samples"] == len(ids(corpus, "train"))
    for name in ("batch.png", "rows.png", "sources.png", "report.html", "preview.json"):
        assert (tmp_path / "look" / name).stat().st_size > 0
    timed = command("prepare", "bench", *reads, "--steps", 2, "--json", "--config.execution.unroll_layers=False")
    figures = json.loads(timed.stdout.splitlines()[-1])
    assert figures["images per second"] > 0 and 0 <= figures["stall share"] <= 1, timed.stderr
    assert figures["bytes to the device per step"] > 4 * 4 * 64 * 64 * 3
