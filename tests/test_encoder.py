"""Vectors of images and texts: as the towers give them, in batches of any size; how an image becomes a square."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.data.resizing import Resizing
from hovle_jax.errors import UserError
from hovle_jax.formats import hf_clip, open_clip
from hovle_jax.inference.encoder import Encoder
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.load(folder, batch_size=4)


def images(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 40, 3), np.uint8) for i in range(count)]


def test_vectors_are_the_towers(encoder):
    pictures, texts = images(6), ["a red circle", "a blue square", "a word " * 50]
    clip = encoder.loaded.models["clip"].bind({"params": encoder.loaded.params["clip"]})
    tiles = np.stack([encoder.shape.resizing.tile(picture) for picture in pictures])
    rows = np.stack([encoder.text_row(text) for text in texts])
    made, said = encoder.images(pictures), encoder.texts(texts)
    np.testing.assert_allclose(made, clip.encode_images(tiles), atol=1e-5)
    np.testing.assert_allclose(said, clip.encode_texts(rows), atol=1e-5)
    np.testing.assert_allclose(encoder.images(pictures, "pooled"), clip.image_states(tiles)[1], atol=1e-4)
    np.testing.assert_allclose(encoder.projected(encoder.images(pictures, "pooled")), made, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    logits = encoder.scale * made @ said.T + encoder.bias
    np.testing.assert_allclose(logits, clip.logits(made, said), rtol=1e-4)
    assert rows.shape == (3, encoder.config.text.context) and rows[2, -1] == encoder.config.text.end_id


def test_the_batch_changes_no_vector(encoder):
    pictures = images(5)
    other = dataclasses.replace(encoder, batch_size=16)
    assert other.rows % 8 == 0
    np.testing.assert_allclose(other.images(pictures), encoder.images(pictures), atol=1e-5)


def test_nothing_gives_no_vectors(encoder):
    width = encoder.config.projection_width
    assert encoder.images([]).shape == encoder.texts([]).shape == (0, width)
    assert encoder.images([], "pooled").shape == (0, encoder.config.vision.width)


def test_a_folder_without_towers(folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        Encoder.load(tmp_path / "absent")
    (folder / "tokenizer.model").rename(folder / "elsewhere")
    try:
        with pytest.raises(UserError, match="has no tokenizer"):
            Encoder.load(folder)
    finally:
        (folder / "elsewhere").rename(folder / "tokenizer.model")


def gradient(width, height):
    """An image whose red says the column and whose green says the row."""
    made = np.zeros((height, width, 3), np.uint8)
    made[..., 0] = np.linspace(0, 255, width)[None].round()
    made[..., 1] = np.linspace(0, 255, height)[:, None].round()
    made[..., 2] = 255
    return Image.fromarray(made)


def test_squash_keeps_all_of_an_image():
    tile = Resizing(24, "squash").tile(gradient(96, 48))
    assert tile.shape == (24, 24, 3) and tile[12, 0, 0] < 10 and tile[12, -1, 0] > 245


def test_shortest_cuts_the_middle_out():
    tile = Resizing(24, "shortest").tile(gradient(96, 48)).astype(int)
    assert tile.shape == (24, 24, 3) and tile[0, 12, 1] < 10 and tile[-1, 12, 1] > 245
    assert abs(tile[12, 0, 0] - 255 / 4) < 8 and abs(tile[12, -1, 0] - 255 * 3 / 4) < 8
    # 75 / 50 of 24 is 36, of which 6 columns go on each side.
    whole = np.asarray(gradient(75, 50).resize((36, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(Resizing(24, "shortest").tile(gradient(75, 50)), whole[:, 6:30])


def test_longest_fills_with_black():
    tile = Resizing(24, "longest").tile(gradient(96, 48))
    assert tile.shape == (24, 24, 3) and not tile[:6].any() and not tile[18:].any() and (tile[6:18, :, 2] > 250).all()
    bilinear = Resizing(24, "longest", "bilinear").tile(gradient(48, 96))
    assert not bilinear[:, :6].any() and (bilinear[:, 6:18, 2] > 250).all()


def test_a_tile_of_the_right_size_is_the_image():
    image = gradient(24, 24)
    for mode in ("squash", "shortest", "longest"):
        assert np.array_equal(Resizing(24, mode).tile(image), np.asarray(image))


PREPROCESSORS = {  # preprocessor_config.json -> (resize, interpolation)
    "CLIP": ({"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}, ("shortest", "bicubic")),
    "an old CLIP": ({"size": 24, "crop_size": 24, "resample": 3}, ("shortest", "bicubic")),
    "SigLIP": ({"size": {"height": 24, "width": 24}, "resample": 3}, ("squash", "bicubic")),
    "SigLIP 2": ({"size": {"height": 24, "width": 24}, "resample": 2}, ("squash", "bilinear")),
    "without a size": ({"image_mean": [0.5, 0.5, 0.5]}, ("shortest", "bicubic")),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_how_a_public_model_resizes(name, tmp_path):
    written, expected = PREPROCESSORS[name]
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(written))
    config = dataclasses.replace(micro.clip_config(), resize="shortest")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=24))
    found = hf_clip.with_preprocessor(config, path)
    assert (found.resize, found.interpolation) == expected
    path.write_text(json.dumps(hf_clip.preprocessor_to_json(found)))
    assert hf_clip.with_preprocessor(config, path) == found


def test_another_size_is_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"shortest_edge": 999}}')
    with pytest.raises(UserError, match="size=.*999.* is not supported; images are resized to the tower's"):
        hf_clip.with_preprocessor(micro.clip_config(), path)


def test_open_clip_says_how_it_resizes():
    config = dataclasses.replace(micro.clip_config(), family="open_clip", resize="longest", interpolation="bilinear")
    written = open_clip.config_to_json(config)
    read = open_clip.config_from_json(written)
    assert (read.resize, read.interpolation) == ("longest", "bilinear")
