"""An index of a folder's images on disk: their vectors, by one model, which may be searched and brought up to date.

    INDEX/index.json             the model, its digest, the folder, and which files are the index; written last
    INDEX/vectors-DIGEST.npy     [N, E] float32 unit vectors, memory-mapped when they are searched
    INDEX/images-DIGEST.jsonl    for each its path below the folder, size and time of change
    INDEX/vectors-DIGEST.graph   if it is asked for: their graph, see `approximate`

index.json names the others and is replaced at once: an update that is cut off leaves the index as it was.

Letters: N images, E width of the common space.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.tar_shard import IMAGE_SUFFIXES
from hovle_jax.data.images import decode_image
from hovle_jax.errors import UserError
from hovle_jax.inference.digests import component_digest, tokenizer_digest
from hovle_jax.inference.encoder import Encoder
from hovle_jax.retrieval import approximate
from hovle_jax.retrieval.nearest import nearest
from hovle_jax.system.files import read_json, reason_of, write_json, write_whole
from hovle_jax.system.lock import locked
from hovle_jax.system.progress import track

FILE_NAME = "index.json"
VERSION = 1
NEEDS = ("version", "checkpoint", "digest", "dtype", "folder", "vectors", "images")
REMEDY = "remove the index, and make it again by 'search index'"


class Entry(NamedTuple):
    """An image file: its path below the folder, size in bytes, and when it was changed, in nanoseconds."""

    path: str
    size: int
    mtime: int


@dataclasses.dataclass(frozen=True)
class Index:
    """What an index holds.

    Attributes:
      about: what index.json says.
      entries: of the images.
      vectors: [N, E] float32.
      graph: of them; None = none.
    """

    about: dict[str, Any]
    entries: list[Entry]
    vectors: np.ndarray
    graph: pathlib.Path | None = None

    @classmethod
    def load(cls, index: str | os.PathLike) -> "Index":
        """Raises UserError where there is none, or it is damaged."""
        index = pathlib.Path(index)
        if not (index / FILE_NAME).is_file():
            raise UserError(f"there is no index in {index}; make it by 'search index --images FOLDER --index {index}'")
        about = read_json(index / FILE_NAME, NEEDS, REMEDY)
        try:
            vectors = np.load(index / about["vectors"], mmap_mode="r", allow_pickle=False)
            lines = (index / about["images"]).read_text("utf-8").splitlines()
            entries = [Entry(*json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"the index {index} is damaged ({reason_of(error)}); {REMEDY}") from None
        if vectors.ndim != 2 or len(vectors) != len(entries):
            raise UserError(f"the index {index} is damaged: vectors {vectors.shape} of {len(entries)} images; {REMEDY}")
        graph = index / about["graph"] if about.get("graph") else None
        if graph and not graph.is_file():
            raise UserError(f"the index {index} is damaged: {graph.name} is not there; {REMEDY}")
        return cls(about, entries, vectors, graph)

    def nearest(self, queries: np.ndarray, count: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The images of the largest cosines, (scores, ids) [Q, K]; by the graph, if there is one.

        Args:
          exact: look at all.
        """
        if exact or self.graph is None:
            return nearest(queries, self.vectors, count)
        return approximate.search(self.graph, self.vectors, queries, count)

    def check_model(self, index: str | os.PathLike, checkpoint: str | os.PathLike, dtype: str) -> None:
        """Raises UserError unless it is of this model."""
        if self.about["digest"] != digest_of(checkpoint) or self.about["dtype"] != dtype:
            raise UserError(
                f"the index {index} is of another model ({self.about['checkpoint']}, {self.about['dtype']}) than "
                f"{checkpoint} ({dtype}): give that one with --checkpoint, or another --index"
            )


@dataclasses.dataclass(frozen=True)
class Update:
    """What came of an update: images in all, encoded now, taken over, gone; (path, reason) of those left out."""

    images: int
    encoded: int
    kept: int
    gone: int
    bad: tuple[tuple[str, str], ...]


def digest_of(checkpoint: str | os.PathLike) -> str:
    """Of the towers and the tokenizer."""
    parts = component_digest(checkpoint, "clip"), tokenizer_digest(checkpoint)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def update(
    encoder: Encoder,
    checkpoint: str,
    images: str | os.PathLike,
    index: str | os.PathLike,
    say: Callable[[str], None],
    graph: bool = False,
) -> Update:
    """Makes an index of all images below a folder, or brings it up to date: what is unchanged is not encoded again.

    Args:
      say: called with lines of progress.
      graph: make a graph of the vectors too, as is done for an index that has one.
    Raises:
      UserError: no such folder, no image that can be read, another process writes the index, or it is of another model
        or folder.
    """
    images, index = pathlib.Path(images).absolute(), pathlib.Path(index)
    found = files_below(images)
    if not found:
        raise UserError(f"{images} has no images; they end with {', '.join(IMAGE_SUFFIXES)}")
    try:
        index.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {index}: {reason_of(error)}") from None
    with locked(index, say):
        return _update(encoder, checkpoint, images, found, index, say, graph)


def _update(encoder, checkpoint, images, found, index, say, graph):
    dtype = encoder.loaded.config.execution.dtype
    about = {"version": VERSION, "checkpoint": os.path.abspath(checkpoint), "digest": digest_of(checkpoint)}
    about |= {"dtype": dtype, "folder": str(images)}
    before = Index(about, [], np.zeros((0, encoder.width()), np.float32))
    if (index / FILE_NAME).is_file():
        before = Index.load(index)
        before.check_model(index, checkpoint, dtype)
        if before.about["folder"] != str(images):
            raise UserError(f"the index {index} is of {before.about['folder']}, not of {images}: give another --index")
    if graph := graph or before.graph is not None:
        approximate.check_installed()
    places = {entry: i for i, entry in enumerate(before.entries)}
    fresh = [entry for entry in found if entry not in places]
    vectors, bad = _encoded(encoder, images, fresh, say)
    entries = [entry for entry in found if entry in places or entry in vectors]
    if not entries:
        raise UserError(
            f"none of {len(found):,} images below {images} can be read; the first: {bad[0][0]}: {bad[0][1]}"
        )
    rows = np.stack([before.vectors[places[entry]] if entry in places else vectors[entry] for entry in entries])
    _write(index, about, entries, rows.astype(np.float32), say if graph else None)
    kept = sum(entry in places for entry in entries)
    return Update(len(entries), len(vectors), kept, len(before.entries) - kept, tuple(bad))


def files_below(folder: pathlib.Path) -> list[Entry]:
    """All images below a folder, by name; those in hidden folders not. Raises UserError where there is no folder."""
    if not folder.is_dir():
        raise UserError(f"--images={folder}: there is no such folder")
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = pathlib.Path(place, name)
            if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and not name.startswith(".") and path.is_file():
                facts = path.stat()
                found.append(Entry(path.relative_to(folder).as_posix(), facts.st_size, facts.st_mtime_ns))
    return found


def _encoded(encoder, folder, entries, say):
    """-> ({entry: its vector}, [(path, why it has none)])."""
    good, bad = [], []

    def pictures() -> Iterator[Any]:
        for entry in track(entries, say, "images", "images", len(entries)):
            try:
                image = decode_image(storage.read(folder / entry.path))
            except BadSample as error:
                bad.append((entry.path, f"{error.reason}: {error.detail}"))
                continue
            good.append(entry)
            yield image

    vectors = encoder.images(pictures())
    return dict(zip(good, vectors, strict=True)), bad


def _write(index, about, entries, vectors, say_of_graph):
    lines = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in entries)
    name = hashlib.sha256(lines.encode() + about["digest"].encode()).hexdigest()[:16]
    about = about | {"vectors": f"vectors-{name}.npy", "images": f"images-{name}.jsonl", "count": len(entries)}
    if say_of_graph:
        about |= {"graph": f"vectors-{name}.graph"}
    try:
        partial = index / f"vectors-{name}.partial.npy"
        np.save(partial, vectors)
        partial.replace(index / about["vectors"])
        if say_of_graph and not (index / about["graph"]).is_file():
            partial = index / f"vectors-{name}.partial.graph"
            approximate.build(vectors, partial, say_of_graph)
            partial.replace(index / about["graph"])
    except OSError as error:
        raise UserError(f"cannot write {index}: {reason_of(error)}; what was there before is whole") from None
    write_whole(index / about["images"], lines)
    write_json(index / FILE_NAME, about)
    for path in [*index.glob("vectors-*"), *index.glob("images-*")]:
        if path.name not in (about["vectors"], about["images"], about.get("graph")):
            path.unlink(missing_ok=True)
