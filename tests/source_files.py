"""The same few samples in files of each kind that is read."""

import io
import json
import tarfile

import pytest

from hovle_jax.data.files.records import parse
from hovle_jax.training.stages import STAGES
from tests import broken, micro

COUNT = 14  # rows of each source below


def answer(i):
    return f"it is number {i}" + " and so on" * (i % 3)


def image_file(i):
    """Of different shapes, so that they have 1 to 5 tiles."""
    return broken.encoded(i, size=[(32, 32), (64, 32), (64, 64), (20, 70)][i % 4])


def rows():
    return [{"image": f"{i}.png", "conversations": broken.turns("<image>\nwhat is it?", answer(i))}
            for i in range(COUNT)]  # fmt: skip


def write_jsonl(folder, rows, name="rows.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def write_meta(folder, **entries):
    (folder / "meta.json").write_text(json.dumps(entries))
    return str(folder / "meta.json")


def jsonl(folder):
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(image_file(i))
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
                for name, data in ((f"{i:04d}.png", image_file(i)), (f"{i:04d}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "shard-*.tar")


def parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = [{"image": {"bytes": image_file(i), "path": None}, "question": "what is it?", "answer": answer(i)}
             for i in range(COUNT)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet", row_group_size=4)
    return str(folder / "rows.parquet")


def array_record(folder):
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "train-00000-of-00001.array_record"), "group_size:1")
    for i, row in enumerate(rows()):
        writer.write(msgpack.packb(row | {"id": f"row {i}", "image": image_file(i)}))
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
                    yield i, row | {"image": io.BytesIO(image_file(i))}

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


def answers(source, order=None):
    return [parse(source[i], source.root).turns[0][1] for i in (range(len(source)) if order is None else order)]


def reader_of(stage="instruct", **data):
    data = {"sequence_length": 192, "tiles": 5, "max_tiles": 4, "augment": False} | data
    return STAGES[stage].batch.reader(micro.run_config(stage, data=data), micro.tokenizer())


def quiet(line):
    pass
