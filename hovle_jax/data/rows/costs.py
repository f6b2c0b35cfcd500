"""The index of a source: what each of its samples needs. It is built once and cached; the epoch is planned from it."""

import functools
import json
import os
from collections.abc import Callable, Iterable

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.shard import cached_arrays
from hovle_jax.data.files.sources import Source
from hovle_jax.data.kinds import Reader
from hovle_jax.data.kinds.needs import Costs
from hovle_jax.errors import UserError
from hovle_jax.system.processes import end_with_parent
from hovle_jax.system.progress import track

CHUNK = 2048  # samples that a worker process inspects at a time
MANY = 20_000  # samples from which worker processes are worth starting


def costs_of(source: Source, reader: Reader, say: Callable[[str], object] = print, workers: int = 0) -> Costs:
    """The index of a source, from the cache if it is there.

    Args:
      workers: processes that inspect samples if there are many; 0 = this process alone.
    """
    key = ("costs", source.fingerprint(), source.root, source.outside_root, reader.index_key())
    build = lambda: _build(source, reader, say, workers)
    costs = _load(cached_arrays(key, build))
    # People may repair an image's file, which changes nothing in the file of rows.
    repaired = [i for i, *_ in costs.bad if inspect_samples(source, reader, [i])[0][1] is None]
    return _load(cached_arrays((*key, repaired), build)) if repaired else costs


def _load(arrays):
    bad = tuple(map(tuple, json.loads(bytes(arrays["bad"]).decode() or "[]")))
    return Costs(**{name: array for name, array in arrays.items() if name != "bad"}, bad=bad)


def _build(source, reader, say, workers):
    spans = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    inspected = _each(functools.partial(_chunk, source, reader), spans, workers if len(source) >= MANY else 0)
    size = lambda chunk: len(chunk["text"])
    chunks = list(track(inspected, say, f"indexing {source.name}", "samples", len(source), size))
    bad = [one for chunk in chunks for one in chunk["bad"]]
    join = lambda name: np.concatenate([chunk[name] for chunk in chunks])
    return {
        **{name: join(name) for name in ("text", "first", "images_before", "sizes")},
        "size_ends": np.cumsum(join("images"), dtype=np.int64),
        "bad": np.frombuffer(json.dumps(bad).encode(), np.uint8),
    }


def _chunk(source, reader, span):
    """`inspect_samples` as arrays, which are small to keep and to send between processes."""
    needs, reasons = zip(*inspect_samples(source, reader, span))
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
    ending = {"initializer": end_with_parent, "initargs": (os.getpid(),)}
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, **ending) as pool:
        try:
            yield from pool.map(function, spans)
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"one of the {workers} processes that index was killed (out of memory?); set fewer workers, or 0"
            ) from None


def inspect_samples(source: Source, reader: Reader, span: Iterable[int]) -> list[tuple[tuple, tuple[str, str] | None]]:
    """[((text, first, images_before, sizes), None or (reason, detail)), ...] of the samples of a span."""
    inspected = []
    for i in span:
        try:
            need = reader.needs(source.record(i))
            inspected.append(((need.text, need.first, need.images_before, need.sizes), None))
        except BadSample as error:
            inspected.append(((0, 0, 0, ()), (error.reason, error.detail)))
    return inspected
