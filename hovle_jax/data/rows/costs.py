"""The index of a source: what each of its samples takes, built once, cached, and planned with."""

import dataclasses
import functools
import json

import numpy as np

from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.data.files.records import parse
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.data.files.sources import Source
from hovle_jax.data.images import Tiling
from hovle_jax.data.kinds import Reader
from hovle_jax.system.progress import track

CHUNK = 2048  # samples that a worker process looks at in one go
MANY = 20_000  # samples from which on it is worth starting processes


@dataclasses.dataclass(frozen=True)
class Costs:
    """Needs of the n samples of a source (`kinds.base.Needs`), and those that cannot be used.

    Attributes:
      text, first, images_before: [n]; text is 0 for a bad sample.
      size_ends: [n]; the images of sample i are sizes[size_ends[i - 1] : size_ends[i]].
      sizes: [k, 2] width, height.
      bad: ((i, reason, detail), ...).
    """

    text: np.ndarray
    first: np.ndarray
    images_before: np.ndarray
    size_ends: np.ndarray
    sizes: np.ndarray
    bad: tuple

    def tiles(self, tiling: Tiling):
        """[n], [n] int64: tiles of each sample, and of its images in front of what is learned first."""
        ends = np.asarray(self.size_ends, np.int64)
        images = np.diff(ends, prepend=0)
        owner = np.repeat(np.arange(len(images)), images)
        shared = images[owner]
        different, which = np.unique(
            np.concatenate([np.asarray(self.sizes, np.int64).reshape(-1, 2), shared[:, None]], axis=1),
            axis=0,
            return_inverse=True,
        )
        counts = np.asarray([tiling.shared_by(k).count(w, h) for w, h, k in different.tolist()], np.int64)[
            which.ravel()
        ]
        place = np.arange(len(owner)) - (ends - images)[owner]
        before = counts * (place < np.asarray(self.images_before)[owner])
        add = lambda values: np.bincount(owner, values, len(images)).astype(np.int64)
        return add(counts), add(before)

    def events(self, source: Source):
        """The bad samples, as those that were found before any step."""
        return [BadEvent(-1, source.name, *source.where(i), reason, detail) for i, reason, detail in self.bad]


def costs_of(source: Source, reader: Reader, say=print, workers=0):
    """The index of a source, from the cache where it is there.

    Args:
      workers: processes that look at samples where there are many; 0 = this one alone.
    """
    key = ("costs", source.fingerprint(), source.root, reader.index_key())
    build = lambda: _build(source, reader, say, workers)
    costs = _load(cached_arrays(key, build))
    # Images have files of their own, which people mend while that of the rows stays as it is.
    mended = [i for i, *_ in costs.bad if look_at(source, reader, [i])[0][1] is None]
    return _load(cached_arrays((*key, mended), build)) if mended else costs


def _load(arrays):
    bad = tuple(map(tuple, json.loads(bytes(arrays["bad"]).decode() or "[]")))
    return Costs(**{name: array for name, array in arrays.items() if name != "bad"}, bad=bad)


def _build(source, reader, say, workers):
    spans = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    found = _each(functools.partial(_chunk, source, reader), spans, workers if len(source) >= MANY else 0)
    size = lambda chunk: len(chunk["text"])
    chunks = list(track(found, say, f"indexing {source.name}", "samples", len(source), size))
    bad = [one for chunk in chunks for one in chunk["bad"]]
    join = lambda name: np.concatenate([chunk[name] for chunk in chunks])
    return {
        **{name: join(name) for name in ("text", "first", "images_before", "sizes")},
        "size_ends": np.cumsum(join("images"), dtype=np.int64),
        "bad": np.frombuffer(json.dumps(bad).encode(), np.uint8),
    }


def _chunk(source, reader, span):
    """`look_at` as arrays: what is kept of many samples, and sent between processes, is small."""
    needs, reasons = zip(*look_at(source, reader, span))
    text, first, images_before, sizes = zip(*needs)
    numbers = {"text": text, "first": first, "images_before": images_before, "images": list(map(len, sizes))}
    arrays = {name: np.asarray(values, np.int32) for name, values in numbers.items()}
    arrays["sizes"] = np.asarray([size for several in sizes for size in several], np.int32).reshape(-1, 2)
    return arrays | {"bad": [(i, *reason) for i, reason in zip(span, reasons) if reason]}


def _each(function, spans, workers):
    if not workers:
        yield from map(function, spans)
        return
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # this process has threads, which a fork would break
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, spans)


def look_at(source, reader, span):
    """[((text, first, images before, sizes), None or (reason, detail)), ...] of some samples."""
    found = []
    for i in span:
        try:
            need = reader.needs(parse(source[i], source.root))
            found.append(((need.text, need.first, need.images_before, need.sizes), None))
        except BadSample as error:
            found.append(((0, 0, 0, ()), (error.reason, error.detail)))
    return found
