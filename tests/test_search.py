"""An index of a folder of images: made, brought up to date, searched; what it refuses."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.inference.encoder import Encoder
from hovle_jax.retrieval import index as module
from hovle_jax.retrieval.index import Index, update
from hovle_jax.system.lock import locked
from tests import micro
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")
COLORS = ("red", "blue", "teal")
SHAPES = ("circle", "rectangle")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(clip):
    return Encoder.load(clip, batch_size=4)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for color in COLORS:
        (folder / color).mkdir(parents=True)
        for shape in SHAPES:
            Image.fromarray(micro.draw(color, shape)).save(folder / color / f"{shape}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def files(index):
    """Names of an index's files, but for its lock."""
    return sorted(path.name for path in index.iterdir() if not path.name.startswith("."))


def test_an_index_has_the_encoders_vectors(encoder, clip, photos, tmp_path):
    made = update(encoder, str(clip), photos, tmp_path / "index", print)
    assert (made.images, made.encoded, made.kept, made.gone, made.bad) == (6, 6, 0, 0, ())
    index = Index.load(tmp_path / "index")
    assert [entry.path for entry in index.entries] == sorted(f"{c}/{s}.png" for c in COLORS for s in SHAPES)
    images = [np.asarray(Image.open(photos / entry.path)) for entry in index.entries]
    np.testing.assert_allclose(index.vectors, encoder.images(images), atol=1e-5)
    assert [name.split("-")[0] for name in files(tmp_path / "index")] == ["images", "index.json", "vectors"]


def test_what_is_unchanged_is_not_encoded_again(encoder, clip, photos, tmp_path):
    again = lambda: update(encoder, str(clip), photos, tmp_path / "index", print)
    again()
    before = Index.load(tmp_path / "index")
    same = again()
    assert (same.images, same.encoded, same.kept, same.gone) == (6, 0, 6, 0)
    (photos / "red" / "circle.png").unlink()
    Image.fromarray(micro.draw("black", "triangle")).save(photos / "new.PNG")
    Image.fromarray(micro.draw("black", "circle")).save(photos / "blue" / "circle.png")
    os.utime(photos / "blue" / "circle.png", ns=(1, 1))
    (photos / "broken.jpg").write_bytes(b"no image")
    changed = again()
    assert (changed.images, changed.encoded, changed.kept, changed.gone) == (6, 2, 4, 2)
    assert [(path, reason.split(":")[0]) for path, reason in changed.bad] == [("broken.jpg", "not_an_image")]
    after = Index.load(tmp_path / "index")
    assert [entry.path for entry in after.entries] == [
        "new.PNG", "blue/circle.png", "blue/rectangle.png", "red/rectangle.png", "teal/circle.png",
        "teal/rectangle.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(after.vectors[4:], before.vectors[4:])
    assert len(files(tmp_path / "index")) == 3


def test_an_update_that_is_cut_off_leaves_the_index(encoder, clip, photos, tmp_path, monkeypatch):
    update(encoder, str(clip), photos, tmp_path / "index", print)
    (photos / "red" / "circle.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_json", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(encoder, str(clip), photos, tmp_path / "index", print)
    assert len(Index.load(tmp_path / "index").entries) == 6
    update(encoder, str(clip), photos, tmp_path / "index", print)
    assert len(Index.load(tmp_path / "index").entries) == 5 and len(files(tmp_path / "index")) == 3


def test_two_updates_at_once_are_refused(encoder, clip, photos, tmp_path):
    (tmp_path / "index").mkdir()
    with locked(tmp_path / "index"), pytest.raises(UserError, match="is in use by .*: two would mix what they write"):
        update(encoder, str(clip), photos, tmp_path / "index", print)


def test_a_graph_finds_what_is_found_among_all(encoder, clip, photos, tmp_path):
    update(encoder, str(clip), photos, tmp_path / "index", print, graph=True)
    index = Index.load(tmp_path / "index")
    assert index.graph and len(files(tmp_path / "index")) == 4
    for by_graph, exact in zip(index.nearest(index.vectors[:2], 4), index.nearest(index.vectors[:2], 4, exact=True)):
        np.testing.assert_allclose(by_graph, exact, rtol=1e-6)
    assert index.nearest(index.vectors[:1], 50)[1].shape == (1, 6)
    (photos / "red" / "circle.png").unlink()
    update(encoder, str(clip), photos, tmp_path / "index", print)  # an index with a graph keeps having one
    after = Index.load(tmp_path / "index")
    assert after.graph and after.graph != index.graph and len(files(tmp_path / "index")) == 4
    assert set(after.nearest(after.vectors[:1], 50)[1][0]) == set(range(5))
    after.graph.write_bytes(after.graph.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        after.nearest(after.vectors[:1], 2)
    after.graph.unlink()
    with pytest.raises(UserError, match="damaged: vectors-.*.graph is not there; remove the index"):
        Index.load(tmp_path / "index")


def test_without_usearch_a_graph_is_refused_and_all_images_are_looked_at(encoder, clip, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module.approximate, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"--ann needs the package usearch; run: pip install .hovle_jax\[ann\]"):
        update(encoder, str(clip), photos, tmp_path / "index", print, graph=True)


def test_another_model_or_folder_is_refused(encoder, clip, photos, tmp_path, monkeypatch):
    update(encoder, str(clip), photos, tmp_path / "index", print)
    (tmp_path / "others").mkdir()
    Image.fromarray(micro.draw("red", "circle")).save(tmp_path / "others" / "a.png")
    with pytest.raises(UserError, match=r"is of .*photos, not of .*others: give another --index"):
        update(encoder, str(clip), tmp_path / "others", tmp_path / "index", print)
    monkeypatch.setattr(module, "digest_of", lambda folder: "another")
    with pytest.raises(UserError, match="is of another model .*: give that one with --checkpoint, or another --index"):
        update(encoder, str(clip), photos, tmp_path / "index", print)


@pytest.mark.parametrize("damage", ["vectors", "images", "index.json"])
def test_a_damaged_index_is_said(damage, encoder, clip, photos, tmp_path):
    update(encoder, str(clip), photos, tmp_path / "index", print)
    (path,) = (tmp_path / "index").glob(f"{damage}*")
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    with pytest.raises(UserError, match="damaged.*; remove the index"):
        Index.load(tmp_path / "index")


def test_folders_without_images(encoder, clip, tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        update(encoder, str(clip), tmp_path / "absent", tmp_path / "index", print)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images; they end with jpg"):
        update(encoder, str(clip), tmp_path / "empty", tmp_path / "index", print)
    (tmp_path / "empty" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 images .* a.png: not_an_image"):
        update(encoder, str(clip), tmp_path / "empty", tmp_path / "index", print)
    assert not files(tmp_path / "index")


def test_the_command(clip, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no image")
    place = ["--index", tmp_path / "index"]
    made = command("search", "index", "--checkpoint", clip, "--images", photos, *place, "--json")
    assert made.returncode == 1 and "broken.jpg cannot be read" in made.stderr
    assert json.loads(made.stdout) | {"index": ""} == {
        "index": "", "images": 6, "encoded": 6, "kept": 0, "gone": 0, "unreadable": 1,
    }  # fmt: skip
    asked = photos / "teal" / "circle.png"
    found = command("search", "query", *place, "--image", asked, "--top", "3", "--picture", tmp_path / "hits.png")
    assert found.returncode == 0, found.stderr
    first = found.stdout.splitlines()[0].split()
    assert float(first[0]) == pytest.approx(1, abs=1e-3) and first[1] == str(asked) and found.stdout.count("\n") == 3
    assert Image.open(tmp_path / "hits.png").size[0] > 300
    said = command("search", "query", *place, "--text", "a red circle", "--json")
    hits = json.loads(said.stdout)["hits"]
    assert len(hits) == 6 and [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


MISTAKES = {
    "no action": ("--index=TMP/i", "usage: python -m hovle_jax.search index|query"),
    "no index": ("query --index=TMP/i --text=x", "there is no index in TMP/i; make it by 'search index"),
    "no question": ("query --index=TMP/i", "give --text"),
    "two questions": ("query --index=TMP/i --text=x --image=y.png", "and not both"),
    "a picture as a text": ("query --index=TMP/i --text=x --picture=hits.txt", "--picture=hits.txt"),
    "no folder": ("index --checkpoint=TMP --images=TMP/absent --index=TMP/i", "there is no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    given, message = (text.replace("TMP", str(tmp_path)) for text in MISTAKES[name])
    result = command("search", *given.split())
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
