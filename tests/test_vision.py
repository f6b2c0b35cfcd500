"""What every tower does to an image, against the definitions and PyTorch's numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.formats.mapping import patch_kernel
from hovle_jax.model.vision import normalize_tiles, normalized_patches, patchify, pixel_shuffle, resize_positions

BICUBIC = dict(np.load(pathlib.Path(__file__).with_name("fixtures") / "bicubic.npz"))


def test_pixel_shuffle_order():
    """On a 4x4 grid numbered row-major, token 0 holds (r0c0, r0c1, r1c0, r1c1) and tokens stay row-major."""
    numbers = np.arange(16).reshape(1, 16, 1)
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    np.testing.assert_array_equal(pixel_shuffle(numbers), expected)


def test_pixel_shuffle_keeps_channels_together():
    x = np.arange(4 * 3).reshape(1, 4, 3)
    np.testing.assert_array_equal(pixel_shuffle(x)[0, 0], np.arange(12))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_patches_in_blocks_are_shuffled_by_a_reshape(dtype):
    tiles = np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3)).astype(dtype)
    plain = patchify(normalize_tiles(jnp.asarray(tiles)), 4)
    np.testing.assert_array_equal(normalized_patches(tiles, 4), plain)
    in_blocks = normalized_patches(tiles, 4, in_blocks=True)
    np.testing.assert_array_equal(in_blocks.reshape(3, -1, 4 * in_blocks.shape[-1]), pixel_shuffle(plain))


@pytest.mark.parametrize("patch_size", [2, 7])
def test_patchify_is_the_convolution(patch_size):
    """Patches times the imported kernel = PyTorch's strided convolution, patches row-major."""
    rng = np.random.default_rng(0)
    tiles = rng.normal(size=(2, 14, 14, 3)).astype(np.float32)
    convolution = rng.normal(size=(5, 3, patch_size, patch_size)).astype(np.float32)
    (kernel,) = patch_kernel(patch_size).split(convolution)
    ours = patchify(tiles, patch_size) @ kernel
    expected = jax.lax.conv_general_dilated(
        tiles.transpose(0, 3, 1, 2), convolution, (patch_size, patch_size), "VALID", precision="highest"
    )
    np.testing.assert_allclose(ours, expected.reshape(2, 5, -1).transpose(0, 2, 1), atol=1e-4)


@pytest.mark.parametrize("sizes", sorted(k.removeprefix("source_") for k in BICUBIC if k.startswith("source_")))
def test_position_resize_is_pytorch_bicubic(sizes):
    """Fixture: tests/fixtures/make_bicubic.py."""
    ours = resize_positions(BICUBIC[f"source_{sizes}"], int(sizes.split("_")[1]))
    np.testing.assert_allclose(ours, BICUBIC[f"resized_{sizes}"], atol=1e-5, rtol=0)
