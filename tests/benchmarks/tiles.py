"""Tiles a second from JPEG files: this project's input pipeline against torchvision's DataLoader.

    pip install -e ".[benchmark]" && python tests/benchmarks/tiles.py

Both read the same images and make the same 448-pixel tiles of them (checked first: equal pixels), InternVL's way:
grid, bicubic resize, crops, thumbnail. The peer is torch.utils.data.DataLoader over InternVL's transform, written with
torchvision.transforms, with as many worker processes as there are cores. Ours is the whole pipeline, from the index
over packing to the batch contract; its tiles are uint8, as they travel to a device. A second figure adds what the
device then does, the model's own normalisation, on this CPU. The two take turns; the ratio is that of the medians.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.system import malloc
from hovle_jax.training.stages import STAGES

SIZE = 448
MAX_TILES = 12
PAUSE = 2.0  # seconds
READY = 160  # tiles that either side may have prepared while it waited
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_images(folder, count, seed=0):
    """JPEG files with the spectrum of photographs, 480 to 1600 pixels a side, and their jsonl."""
    from PIL import Image

    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        width, height = (int(side) for side in rng.integers(480, 1601, 2))
        pixels = sum(
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((width, height)), np.float32
            )
            / weight
            for n, weight in ((4, 2), (16, 4), (64, 8), (256, 8))
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "noise"}]
        rows.append({"image": f"{i}.jpg", "width": width, "height": height, "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# The peer


def grid_of(width, height):
    """InternVL's choice, in the peer's own plain Python."""
    found = {
        (i, j)
        for n in range(1, MAX_TILES + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if 1 <= i * j <= MAX_TILES
    }
    best, least = (1, 1), float("inf")
    for grid in sorted(found, key=lambda g: g[0] * g[1]):
        difference = abs(width / height - grid[0] / grid[1])
        if difference < least:
            best, least = grid, difference
        elif difference == least and width * height > 0.5 * SIZE * SIZE * grid[0] * grid[1]:
            best = grid
    return best


class ImageFolder:
    """A torch data set of [tiles, 3, S, S] float32."""

    def __init__(self, folder):
        from torchvision import transforms as T
        from torchvision.transforms.functional import InterpolationMode

        self.paths = sorted(folder.glob("*.jpg"))
        self.transform = T.Compose(
            [
                T.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
                T.Resize((SIZE, SIZE), interpolation=InterpolationMode.BICUBIC),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        import torch
        from PIL import Image

        image = Image.open(self.paths[index]).convert("RGB")
        columns, rows = grid_of(*image.size)
        whole = image.resize((columns * SIZE, rows * SIZE))
        tiles = [
            whole.crop((c * SIZE, r * SIZE, (c + 1) * SIZE, (r + 1) * SIZE))
            for r in range(rows)
            for c in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(image.resize((SIZE, SIZE)))
        return torch.stack([self.transform(tile) for tile in tiles])


def peer_batches(folder, workers, batch):
    """Endless batches [tiles of `batch` images, 3, S, S]."""
    import torch

    loader = torch.utils.data.DataLoader(
        ImageFolder(folder), batch_size=batch, shuffle=True, num_workers=workers, collate_fn=torch.cat,
        persistent_workers=True, prefetch_factor=2, multiprocessing_context="fork",
    )  # fmt: skip
    while True:
        yield from loader


# ---------------------------------------------------------------------------------------------------------------------
# Ours


class PlainTokenizer(Tokenizer):
    """Ids of bytes: text costs next to nothing here, on either side."""

    bos, eos, vocab_size, first_special, stop_ids = 1, 2, 270, 260, ()

    def __init__(self):
        names = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
        super().__init__({name: 260 + i for i, name in enumerate(names)})

    def encode(self, text):
        return list(text.encode())

    def _encode_with_ends(self, text):
        return self.encode(text), None

    def _piece(self, index):
        return str(index)


def our_batches(folder, workers):
    """Batches of one row of 16,384 tokens and 44 tiles."""
    from hovle_jax import recipes
    from hovle_jax.config import RunConfig
    from hovle_jax.corpora import loading
    from hovle_jax.data import pipeline

    config = RunConfig.from_dict(recipes.base("instruct", "hovle").to_dict())
    data = dataclasses.replace(
        config.data, source=str(folder / "rows.jsonl"), batch_size=1, sequence_length=16_384, tiles=44,
        system_message="s", max_tiles=MAX_TILES,
    )  # fmt: skip
    config = dataclasses.replace(config, data=data)
    dataset = pipeline.build_dataset(
        config, STAGES[config.stage].batch, PlainTokenizer(), loading.load_corpus(config, "train")
    )
    return dataset, (batch for batch, _, _ in dataset.iterate(0, workers))


def used_tiles(batch):
    """Those that a row has; the rest of its places is empty."""
    return int((batch["image_positions"] < batch["tokens"].shape[1]).sum()) // 256


def check_equal(folder):
    """The two make the same tiles."""
    from hovle_jax.data.images import Tiling, decode_image

    images = ImageFolder(folder)
    for i in (0, 1, 2):
        ours = Tiling(SIZE, 1, MAX_TILES).cut(decode_image(images.paths[i].read_bytes()))
        ours = (ours.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        np.testing.assert_allclose(images[i].numpy().transpose(0, 2, 3, 1), ours, atol=1e-6)


def timed(take, tiles):
    """Tiles a second, over at least so many.

    First the other side's workers fill their buffers and fall silent; then ours are emptied of what lay ready.
    """
    time.sleep(PAUSE)
    done = 0
    while done < READY:
        done += take()
    started, done = time.perf_counter(), 0
    while done < tiles:
        done += take()
    return done / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=450, help="of each turn")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--our_workers", type=int, default=0, help="0: threads")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    malloc.keep_freed_memory()  # as every command does, for both sides
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        os.environ["HOVLE_CACHE"] = str(folder / "cache")
        write_images(folder, arguments.images)
        check_equal(folder)
        peer = peer_batches(folder, arguments.workers, batch=4)
        next(peer)  # its workers start before JAX has threads
        import jax

        from hovle_jax.model.vision import normalize_tiles

        _, ours = our_batches(folder, arguments.our_workers)
        normalize = jax.jit(normalize_tiles)
        turns = {
            "peer": lambda: len(next(peer)),
            "ours": lambda: used_tiles(next(ours)),
            "ours_normalized": lambda: _normalized(next(ours), normalize),
        }
        for take in turns.values():
            timed(take, 50)
        speeds = {name: [] for name in turns}
        for _ in range(arguments.rounds):
            for name, take in turns.items():
                speeds[name].append(timed(take, arguments.tiles))
        medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {f"{name}_tiles_per_second": round(value, 1) for name, value in medians.items()}
    result |= {name + "_ratio": round(medians[name] / medians["peer"], 2) for name in turns if name != "peer"}
    print(json.dumps(result | {"cores": os.cpu_count(), "peer_workers": arguments.workers}))


def _normalized(batch, normalize):
    normalize(batch["tiles"]).block_until_ready()
    return used_tiles(batch)


if __name__ == "__main__":
    main()
