"""Labelled images: folders of classes, rows of every kind with a class in a field, and what is wrong with them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hovle_jax.corpora.converting import convert
from hovle_jax.data.bad_samples import BadEvent
from hovle_jax.data.files.records import class_text
from hovle_jax.data.files.shard_kinds import ParquetShard
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.labelled import open_labelled
from tests import broken
from tests.source_files import quiet, write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")
CLASSES = ("cat", "dog", "cat", "old owl", "dog")
NAMES = ("cat", "dog", "old owl")
LABELS = [0, 1, 0, 2, 1]


def picture(i):
    """A PNG of one colour, by which it is known again."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6 + i), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def jsonl(folder, field="label", values=CLASSES):
    for i in range(len(CLASSES)):
        (folder / f"{i}.png").write_bytes(picture(i))
    return write_jsonl(folder, [{"image": f"{i}.png", field: value, "id": i} for i, value in enumerate(values)])


def parquet(folder, names=None):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = LABELS if names else CLASSES
    table = pa.Table.from_pylist([{"img": {"bytes": picture(i)}, "label": v} for i, v in enumerate(values)])
    if names:
        stated = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(stated)})
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    return str(folder / "rows.parquet")


def tar(folder, as_json=False):
    with tarfile.open(folder / "a.tar", "w") as file:
        for i, (name, number) in enumerate(zip(CLASSES, LABELS)):
            said = ("json", json.dumps({"label": name}).encode()) if as_json else ("cls", f"{number}\n".encode())
            for extension, data in (("png", picture(i)), said):
                member = tarfile.TarInfo(f"{i:03d}.{extension}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    if not as_json:
        (folder / "classnames.txt").write_text("\n".join(NAMES))
    return str(folder / "*.tar")


def prepared(folder):
    convert(jsonl(folder), folder / "made", say=quiet)
    return f"{folder}/made:train"


def tfds(folder):
    builders = pytest.importorskip("tensorflow_datasets")

    with builders.core.registered.skip_registration():

        class Labels(builders.core.GeneratorBasedBuilder):
            VERSION = builders.core.Version("1.0.0")

            def _info(self):
                features = {"image": builders.features.Image(encoding_format="png")}
                features["label"] = builders.features.ClassLabel(names=list(NAMES))
                return builders.core.DatasetInfo(builder=self, features=builders.features.FeaturesDict(features))

            def _split_generators(self, download):
                return {"test": self._generate_examples()}

            def _generate_examples(self):
                for i, name in enumerate(CLASSES):
                    yield i, {"image": io.BytesIO(picture(i)), "label": name}

    builder = Labels(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def meta(folder):
    """Two sources, of which one has classes that the other lacks."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    jsonl(folder / "a", values=("cat", "dog", "cat", None, None))
    jsonl(folder / "b", values=(None, None, None, "old owl", "dog"))
    described = {name: {"annotation": f"{name}/rows.jsonl", "root": name} for name in ("a", "b")}
    (folder / "meta.json").write_text(json.dumps(described))
    return str(folder / "meta.json")


def folders(folder):
    for i, name in enumerate(CLASSES):
        place = folder / "set" / name.replace(" ", "_") / ("more" if i == 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(picture(i))
    (folder / "set" / "notes").mkdir()  # no image, so no class
    (folder / "set" / "cat" / "readme.txt").touch()
    return str(folder / "set")


SOURCES = {
    "jsonl": jsonl,
    "parquet": parquet,
    "parquet with names": lambda folder: parquet(folder, NAMES),
    "tar": tar,
    "tar with json": lambda folder: tar(folder, as_json=True),
    "prepared": prepared,
    "tfds": tfds,
    "folders": folders,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_images_come_with_their_classes(kind, tmp_path):
    labelled = open_labelled(SOURCES[kind](tmp_path))
    assert labelled.names == NAMES and len(labelled) == 5 and labelled.labels.dtype == np.int32
    items = list(labelled.items)
    assert [item.label for item in items] == labelled.labels.tolist()
    found = sorted((item.image.height - 6, item.label, item.image.getpixel((0, 0))[0]) for item in items)
    assert found == [(i, label, 10 * i) for i, label in enumerate(LABELS)]
    assert all(item.where[0].startswith(str(tmp_path)) for item in items)
    (one,) = labelled.at([3])
    assert one.label == items[3].label and one.where == items[3].where


def test_sources_of_a_meta_file_share_their_classes(tmp_path):
    labelled = open_labelled(meta(tmp_path))
    assert labelled.names == NAMES and labelled.labels.tolist() == [0, 1, 0, -1, -1, -1, -1, -1, 2, 1]
    assert labelled.item(8).image.getpixel((0, 0))[0] == 30 and "/b/" in labelled.item(8).where[0]


def test_a_few_are_spread_over_all(tmp_path):
    labelled = open_labelled(folders(tmp_path))
    few = labelled.first(3)
    assert few.labels.tolist() == [0, 1, 2] and few.names == NAMES
    assert [item.where for item in few.items] == [item.where for item in labelled.at([0, 2, 4])]
    assert labelled.first(0) is labelled.first(9) is labelled


def test_classes_are_read_once_and_of_their_column_alone(tmp_path, monkeypatch):
    path, read = parquet(tmp_path), []
    real = ParquetShard._read_group
    monkeypatch.setattr(ParquetShard, "_read_group", lambda self, *of: read.append(of[1:]) or real(self, *of))
    open_labelled(path)
    assert read[-3:] == [(["label"],)] * 3 and not any(read[:-3])  # the first rows say which fields there are
    read.clear()
    assert open_labelled(path).names == NAMES and (["label"],) not in read


def test_numbers_are_sorted_as_numbers(tmp_path):
    labelled = open_labelled(jsonl(tmp_path, "group", (10, 9.0, [10], "2", 9)), "group")
    assert labelled.names == ("2", "9", "10") and labelled.labels.tolist() == [2, 1, 2, 0, 1]
    assert class_text({"a": 1}) is class_text([1, 2]) is class_text("  ") is class_text(1.5) is None
    assert class_text(b"owl") == class_text(" owl\n") == "owl"


def test_one_bad_image_among_many_is_named(tmp_path):
    path = jsonl(tmp_path, values=("cat", "dog", None, "cat", "dog"))
    (tmp_path / "0.png").write_bytes(broken.encoded(0)[:60])
    (tmp_path / "4.png").unlink()
    items = list(open_labelled(path).items)
    bad = {i: item.image.reason for i, item in enumerate(items) if isinstance(item.image, BadEvent)}
    assert bad == {0: "truncated_image", 2: "no_class", 4: "missing_image"}
    assert items[2].label == -1 and items[0].image.shard == path and "line at byte 0" in items[0].image.sample


def test_a_class_that_the_names_lack_is_none(tmp_path):
    path = jsonl(tmp_path, values=(0, 1, 5, "owl", "dog"))
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    assert open_labelled(path).labels.tolist() == [0, 1, -1, 2, 1]


def empty(folder):
    (folder / "set").mkdir()
    return folder / "set"


def loose(folder):
    jsonl(folder)
    return folder


def without_images(folder):
    (folder / "set" / "cat").mkdir(parents=True)
    return folder / "set"


def twice(folder):
    folders(folder)
    (folder / "set" / "Old owl").mkdir()
    (folder / "set" / "Old owl" / "a.png").write_bytes(picture(1))
    return folder / "set"


def other_count(folder):
    folders(folder)
    (folder / "set" / "classnames.txt").write_text("cat\ndog\n")
    return folder / "set"


MISTAKES = {
    "nothing": (lambda folder: folder / "absent", "", "no file at .*absent"),
    "empty": (empty, "", "set is empty; it needs a folder of images for each class"),
    "loose": (loose, "", "has no folders of classes, but 6 files .*0.png, 1.png.*put the images of each class"),
    "without images": (without_images, "", "1 folders and no image below them"),
    "twice": (twice, "", "names the class 'Old owl' twice|names the class 'old owl' twice"),
    "other count": (other_count, "", "names 2 classes, and there are 3"),
    "field of a folder": (folders, "group", "--label=group names a field of rows"),
    "no field": (lambda folder: jsonl(folder, "kind"), "", "no field 'label' or .*they have image, kind, id"),
    "no such field": (jsonl, "group", "rows have no field 'group'; they have image, label, id"),
    "no class": (lambda folder: jsonl(folder, values=[{}] * 5), "", "no row names a class under 'label'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_is_said(name, tmp_path):
    make, label, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        open_labelled(make(tmp_path), label)
