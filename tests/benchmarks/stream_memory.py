"""Resident memory while many samples stream through the pipeline.

    python tests/benchmarks/stream_memory.py

Writes tar shards (webdataset) of small JPEGs with conversations, 200,000 samples in all, and reads one epoch of packed
rows as a run would. After a tenth as warm-up the resident memory is read at every further twentieth; printed is the
largest deviation from its mean. `--jsonl` reads files of their own instead of shards.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import tarfile
import tempfile
import time

import numpy as np

from hovle_jax.system import malloc
from hovle_jax.training.stages import STAGES


def resident():
    """Bytes of this process, what of mapped files is in memory included."""
    fields = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def images(count=500):
    from PIL import Image

    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(32, 160, 2))
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG")
        made.append((buffer.getvalue(), width, height))
    return made


def row_of(index, width, height):
    turns = [
        {"from": "human", "value": f"<image>\nwhat is number {index}?"},
        {"from": "gpt", "value": "noise " * (1 + index % 17)},
    ]
    return {"id": index, "width": width, "height": height, "conversations": turns}


def write_tars(folder, samples, per_shard=5000):
    made = images()
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_shard, samples)):
                data, width, height = made[i % len(made)]
                for name, content in ((f"{i}.jpg", data), (f"{i}.json", json.dumps(row_of(i, width, height)).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def write_jsonl(folder, samples):
    made = images()
    for i, (data, _, _) in enumerate(made):
        (folder / f"{i}.jpg").write_bytes(data)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(samples):
            _, width, height = made[i % len(made)]
            file.write(json.dumps(row_of(i, width, height) | {"image": f"{i % len(made)}.jpg"}) + "\n")
    return str(folder / "rows.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--jsonl", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    malloc.keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        os.environ["HOVLE_CACHE"] = str(folder / "cache")
        write = write_jsonl if arguments.jsonl else write_tars
        source = write(folder, arguments.samples)
        # The index is built in a process of its own: what that takes would stay here, and hide what streaming takes.
        started = time.perf_counter()
        indexing = multiprocessing.get_context("spawn").Process(target=open_dataset, args=(source,))
        indexing.start()
        indexing.join()
        seconds = time.perf_counter() - started
        print(json.dumps(stream(source, arguments.samples) | {"seconds to index": round(seconds, 1)}))


def open_dataset(source):
    from hovle_jax import recipes
    from hovle_jax.config import RunConfig
    from hovle_jax.corpora import loading
    from hovle_jax.data import pipeline

    config = RunConfig.from_dict(recipes.base("instruct", "tiny").to_dict())
    data = dataclasses.replace(config.data, source=source, batch_size=8, sequence_length=1024, tiles=40, max_tiles=4)
    config = dataclasses.replace(config, data=data)
    corpus = loading.load_corpus(config, "train")
    few = dataclasses.replace(corpus, entries=(dataclasses.replace(corpus.entries[0], repeat=0.01),))
    tokenizer = pipeline.train_tokenizer(config, few)
    return pipeline.build_dataset(config, STAGES[config.stage].batch, tokenizer, corpus)


def stream(source, samples):
    dataset = open_dataset(source)
    done, sizes, started = 0, [], time.perf_counter()
    for _, events, drawn in dataset.iterate():
        assert not events, events
        done += drawn
        if done >= samples * (0.1 + 0.05 * len(sizes)):
            sizes.append(resident())
        if done >= samples:
            break
    seconds, mean = time.perf_counter() - started, float(np.mean(sizes))
    return {
        "samples": done,
        "resident MB, mean": round(mean / 1e6, 1),
        "largest deviation": round(max(abs(size - mean) for size in sizes) / mean, 4),
        "resident MB": [round(size / 1e6, 1) for size in sizes],
        "samples per second": round(done / seconds),
    }


if __name__ == "__main__":
    main()
