"""A CLIP learns emoji in three styles, and is asked about the fourth, and about concepts that it has not seen.

    python -m tests.benchmarks.emoji_clip [--out runs_emoji] [--config.steps=800 ...]

Trains configs/contrast.py:emoji (twenty minutes on two cores; a finished run is not trained again), then measures

  image to image  R@1 of the images in the fourth style among the training images: the nearest shows the same emoji
  image to text   R@1 of the same images among the names of their emoji, and the other way around
  zero-shot       the group of concepts that are held out, in the styles of training and in the fourth

beside the nearest neighbour by pixels. The emoji come from the package indexes once (130 MB).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

from hovle_jax.corpora.loading import source_path
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.images import decode_image
from hovle_jax.data.resizing import Resizing
from hovle_jax.inference.encoder import Encoder

ROOT = pathlib.Path(__file__).resolve().parents[2]
PIXELS = 32  # a side of the images that are compared by pixels


def read(split):
    """-> (Pillow images, rows) of a split of the corpus."""
    (entry,) = open_mixture(source_path("emoji", split, print), split)
    found = [entry.source[i] for i in range(len(entry.source))]
    return [decode_image(row["image"]) for row in found], found


def trained(out, flags):
    """The folder of the finished run, and the seconds that its training took here (None: it was finished)."""
    folder, began = out / "contrast", time.time()
    if (folder / "model" / "config.json").is_file():
        return folder, None
    config = f"{ROOT}/configs/contrast.py:emoji"
    subprocess.run(
        [sys.executable, "-m", "hovle_jax.train", f"--config={config}", f"--workdir={out}", *flags], check=True
    )
    return folder, time.time() - began


def by_pixels(images):
    """[N, PIXELS^2 * 3] unit vectors of centred pixels: the nearest by their product is the nearest by distance,
    whatever the contrast."""
    resized = np.stack([Resizing(PIXELS).tile(image) for image in images]).reshape(len(images), -1).astype(np.float32)
    return unit(resized - resized.mean(0))


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def recall(queries, gallery, wanted, names):
    """R@1: the share of queries whose nearest row of the gallery has the wanted name."""
    nearest = np.argmax(queries @ gallery.T, axis=1)
    return float(np.mean(np.asarray(names)[nearest] == np.asarray(wanted)))


def plain_pixels(queries, gallery, wanted, names):
    """The same by the distance of pixels as they are."""
    flat = lambda images: np.stack([Resizing(PIXELS).tile(image) for image in images]).reshape(len(images), -1) / 255.0
    q, g = flat(queries), flat(gallery)
    nearest = np.argmin((g**2).sum(1)[None] - 2 * q @ g.T, axis=1)
    return float(np.mean(np.asarray(names)[nearest] == np.asarray(wanted)))


def zero_shot(encoder, images, rows, groups):
    """The share of images whose own group has the nearest text."""
    return recall(encoder.images(images), encoder.texts(groups), [row["group"] for row in rows], groups)


def measure(folder):
    encoder = Encoder.load(folder, batch_size=128)
    (gallery, gallery_rows), (queries, query_rows) = read("train"), read("test_style")
    wanted, names = [row["concept"] for row in query_rows], [row["concept"] for row in gallery_rows]
    query_vectors, gallery_vectors = encoder.images(queries), encoder.images(gallery)
    texts = encoder.texts([row["caption"] for row in query_rows])
    groups = sorted({row["group"] for row in gallery_rows})
    pixels = plain_pixels(queries, gallery, wanted, names)
    found = {
        "pixels, image to image": pixels,
        "centred pixels, image to image": recall(by_pixels(queries), by_pixels(gallery), wanted, names),
        "image to image": recall(query_vectors, gallery_vectors, wanted, names),
        "image to text": recall(query_vectors, texts, wanted, wanted),
        "text to image": recall(texts, query_vectors, wanted, wanted),
        "zero-shot, styles of training": zero_shot(encoder, *read("test_concept"), groups),
        "zero-shot, fourth style": zero_shot(encoder, *read("test_both"), groups),
    }
    return found | {"groups": len(groups), "bar for R@1": 1.5 * pixels, "bar for zero-shot": 0.6}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs_emoji"), help="folder of the run")
    arguments, flags = parser.parse_known_args()
    folder, seconds = trained(arguments.out, flags)
    found = measure(folder) | ({} if seconds is None else {"minutes of training": seconds / 60})
    for name, value in found.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")
    (folder / "emoji.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
