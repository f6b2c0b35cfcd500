"""Retrieval by a CLIP: which texts are right, ranks against a loop, the action of `evaluate`."""

import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.pairs import Pairs, captions
from hovle_jax.evaluation.clip.retrieval import measures
from tests import micro
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


ROWS = [
    {"image": "a.png", "captions": ["a red circle", "something round", "a red  circle"]},
    {"image": "b.png", "caption": "a blue rectangle"},
    {"image": "c.png", "caption": "something round"},
    {"image": "a.png", "caption": "a circle"},
    {"image": "broken.png", "caption": "nothing"},
    {"image": "b.png"},
    {"text": "no image"},
]


@pytest.fixture
def rows(tmp_path):
    for name, shape in {"a": ("red", "circle"), "b": ("blue", "rectangle"), "c": ("teal", "circle")}.items():
        Image.fromarray(micro.draw(*shape)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def test_an_image_and_a_text_count_once(rows):
    pairs = Pairs.open(str(rows), 0, False, print)
    found = [image is not None for image in pairs.images()]
    assert found == [True, True, True, False, False, False, False]
    assert list(pairs.texts) == ["a red circle", "something round", "a blue rectangle", "a circle"]
    assert pairs.links == [(0, 0), (0, 1), (1, 2), (2, 1), (0, 3)]
    assert [event.reason for event in pairs.bad] == ["not_an_image", "no_caption", "no_image"]
    images, texts = pairs.owners()
    assert (images[:, None] == texts).tolist() == [[True, True, False, True], [False, False, True, False]] + [
        [True, True, False, True]
    ]
    assert len(Pairs.open(str(rows), 2, False, print)) == 2


def test_captions_of_a_row():
    assert captions({"txt": " a  b "}) == ["a b"] and captions({"caption": ["x", 3, "", "x"]}) == ["x"]
    assert captions({}) == captions(b"") == []


def test_measures_are_those_of_a_loop():
    """Several texts an image, images without one text of their own, equal vectors."""
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    owners = np.arange(30, dtype=np.int32) // 2
    text_owners = rng.permutation(np.concatenate([np.arange(15), rng.integers(0, 15, 40)])).astype(np.int32)
    centres = rng.normal(size=(15, 8))
    images = unit(centres[owners] + 0.8 * rng.normal(size=(30, 8)))
    texts = unit(centres[text_owners] + 0.8 * rng.normal(size=(55, 8)))
    texts[3] = texts[4]
    found = measures(images, texts, owners, text_owners)
    for way, a, b, own, other in (
        ("image to text", images, texts, owners, text_owners),
        ("text to image", texts, images, text_owners, owners),
    ):
        places = []
        for vector, label in zip(a, own):
            scores = b @ vector
            best = scores[other == label].max()
            places.append(1 + np.sum((scores >= best - 1e-6) & (other != label)))
        for k in (1, 5, 10):
            assert found[f"{way} R@{k}"] == round(100 * np.mean(np.asarray(places) <= k), 2)
        assert found[f"{way} median rank"] == np.median(places)
    assert 10 < found["image to text R@1"] < 95


def test_a_model_that_tells_nothing_apart_finds_nothing():
    same, owners = np.ones((20, 4), np.float32) / 2, np.arange(20, dtype=np.int32)
    found = measures(same, same, owners, owners)
    assert found["image to text R@10"] == 0 and found["text to image median rank"] == 20


def test_the_action(clip, rows, tmp_path):
    asked = ["retrieval", "--checkpoint", clip, "--data", rows, "--out", tmp_path / "out", "--json"]
    result = command("evaluate", *asked)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert (found["images"], found["texts"], found["bad rows"]) == (3, 4, 3) and found["image to text R@5"] == 100
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text())["texts"] == 4
    assert len((tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()) == 3


def test_rows_that_are_no_pairs(clip, tmp_path):
    from hovle_jax.evaluation.clip.retrieval import score
    from hovle_jax.inference.encoder import Encoder

    (tmp_path / "rows.jsonl").write_text('{"text": "no image"}\n')
    with pytest.raises(UserError, match="none of 1 rows is an image with a caption; the first: .*no image"):
        score(Encoder.load(clip), Pairs.open(str(tmp_path / "rows.jsonl"), 0, False, print), print)
