"""Meta files: how much of each entry an epoch has."""

import json

import pytest

from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.records import parse
from hovle_jax.errors import UserError
from tests.source_files import COUNT, rows, write_jsonl, write_meta

pytestmark = pytest.mark.usefixtures("own_cache")


def test_entries_of_a_meta_file(tmp_path):
    write_jsonl(tmp_path, rows())
    path = write_meta(
        tmp_path,
        half={"annotation": "rows.jsonl", "repeat_time": 0.5, "length": 7, "anything": 1},
        twice={"annotation": str(tmp_path / "rows.jsonl"), "root": "/images", "repeat_time": 2, "data_augment": True},
        more={"annotation": "rows.jsonl", "repeat_time": 1.25, "max_dynamic_patch": 6, "data_augment": False},
        little={"annotation": "rows.jsonl", "repeat_time": 0.001},
    )
    half, twice, more, little = open_mixture(path)
    assert half.copies().tolist() == [1] * 7 + [0] * 7  # the leading fraction
    assert twice.copies().tolist() == [2] * COUNT and more.copies().tolist() == [2] * 3 + [1] * 11
    assert little.copies().sum() == 1
    assert [e.augment for e in (half, twice, more)] == [None, True, False]
    assert [e.max_tiles for e in (half, twice, more)] == [None, None, 6]
    assert parse(twice.source[0], twice.source.root).images == ("/images/0.png",)
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
