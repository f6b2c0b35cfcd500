"""How the images of pairs change in training, and which of their captions is read."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hovle_jax.config import PairsConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.augmentation import RATIOS, PairAugmentation, random_crop
from hovle_jax.data.files.records import parse
from hovle_jax.data.resizing import Resizing
from hovle_jax.errors import UserError
from hovle_jax.training.stages import STAGES
from tests import micro
from tests.source_files import quiet

pytestmark = pytest.mark.usefixtures("own_cache")

CAPTIONS = ("a dog", "two words", "an animal, brown")


def test_a_random_crop_lies_within_the_image_and_has_the_area_that_was_asked_for():
    rng = np.random.default_rng(0)
    boxes = [random_crop((200, 160), rng, 0.25) for _ in range(300)]
    areas = np.array([(right - left) * (bottom - top) / (200 * 160) for left, top, right, bottom in boxes])
    ratios = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert all(0 <= left < right <= 200 and 0 <= top < bottom <= 160 for left, top, right, bottom in boxes)
    assert areas.min() > 0.24 and areas.max() > 0.9 and np.median(areas) < 0.75
    assert RATIOS[0] * 0.97 < ratios.min() < 0.8 and 1.25 < ratios.max() < RATIOS[1] * 1.03
    assert len(set(boxes)) > 250


@pytest.mark.parametrize("size, box", [((400, 10), (193, 0, 206, 10)), ((10, 400), (0, 193, 10, 206))])
def test_where_no_crop_fits_it_is_the_middle(size, box):
    assert random_crop(size, np.random.default_rng(0), 1.0) == box


def sides():
    """An image of which the left half is red and the right half blue."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 2] = 200
    return Image.fromarray(pixels)


def tiles(count=60, **config):
    augmentation = PairAugmentation(PairsConfig(**config))
    return [augmentation.tile(sides(), Resizing(16), np.random.default_rng(seed)) for seed in range(count)]


def test_a_pair_changes_by_its_own_random_numbers():
    once, again = tiles(crop_area=0.3, flip=True, color_jitter=0.4), tiles(crop_area=0.3, flip=True, color_jitter=0.4)
    assert all(np.array_equal(*both) for both in zip(once, again)) and len({tile.tobytes() for tile in once}) > 50
    assert all(tile.shape == (16, 16, 3) and tile.dtype == np.uint8 for tile in once)


def test_half_of_the_images_are_mirrored_where_that_is_asked_for():
    mirrored = lambda made: np.mean([tile[8, 0, 2] > tile[8, 0, 0] for tile in made])
    assert mirrored(tiles()) == 0 and 0.3 < mirrored(tiles(flip=True)) < 0.7


def test_colours():
    grey = lambda tile: np.ptp(tile.astype(int), axis=-1).max() == 0
    assert not any(map(grey, tiles())) and 0.3 < np.mean([grey(tile) for tile in tiles(grayscale=0.5)]) < 0.7
    brightest = [tile.max() for tile in tiles(color_jitter=0.5)]
    assert min(brightest) < 150 and max(brightest) > 240
    assert all(190 <= tile.max() <= 215 for tile in tiles())


@pytest.mark.parametrize("changes, message", [
    ({"crop_area": 0.0}, "pairs.crop_area=0.0 is a share of the image"),
    ({"grayscale": 1.5}, "pairs.grayscale=1.5 is a share"),
])  # fmt: skip
def test_what_is_no_share(changes, message):
    with pytest.raises(UserError, match=message):
        PairsConfig(**changes).check()


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_jsonl(folder):
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [{"image": f"{i}.png", "captions": [*CAPTIONS, " ", 3]} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def write_tar(folder):
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for i in range(4):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.json", json.dumps({"captions": CAPTIONS}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "shard-0.tar"


def write_parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": png(i), "path": None}, "captions": list(CAPTIONS)} for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("written", [write_jsonl, write_tar, write_parquet])
def test_of_several_captions_a_sample_has_one(written, tmp_path):
    source = str(written(tmp_path))
    config = micro.run_config("contrast", data=dict(source=source, batch_size=8, augment=True))
    corpus = loading.load_corpus(config, "train", quiet)
    assert set(CAPTIONS) <= set(corpus.texts())
    dataset = pipeline.build_dataset(config, STAGES["contrast"].batch, micro.tokenizer(), corpus)
    batches = [dataset[i] for i in range(6)]
    said = [micro.tokenizer().decode(row) for batch in batches for row in batch["tokens"]]
    assert set(said) == set(CAPTIONS) and min(map(said.count, CAPTIONS)) > 5
    np.testing.assert_array_equal(dataset[3]["tokens"], batches[3]["tokens"])
    np.testing.assert_array_equal(dataset[3]["tiles"], batches[3]["tiles"])
    size = config.clip.vision.image_size
    assert batches[0]["tiles"].shape == (8, 1, size, size, 3)


def test_captions_of_a_row():
    assert parse({"image": b"x", "caption": " one "}).captions == ("one",)
    assert parse({"image": b"x", "captions": ["one", "", None, "two"], "text": "three"}).captions == ("one", "two")
    assert parse({"image": b"x", "captions": {"de": "eins"}, "caption": "one"}).caption == "one"
    assert parse({"image": b"x", "question": "q", "answer": "a"}).captions == ()
