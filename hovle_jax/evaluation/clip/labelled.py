"""Labelled images: a folder of images for each class, or rows with a field that names the class.

    labelled = open_labelled("flowers/val")
    for image, label, where in labelled.items: ...

Only the labels are read at once, and for rows kept in the cache; images are decoded as they are needed.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from hovle_jax.corpora.loading import source_path
from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.data.files import storage
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.tar_shard import IMAGE_SUFFIXES
from hovle_jax.data.images import decode_image
from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.class_names import check_names, names_beside
from hovle_jax.evaluation.clip.labelled_rows import Rows
from hovle_jax.system.printable import printable

SPLIT = "test"  # of folders that have several, unless one is named
NO_CLASS = -1
AHEAD = 8  # images that are read before they are asked for
SAID = 5  # files or fields that a message names


class Item(NamedTuple):
    """An image with its class.

    Attributes:
      image: Pillow's, RGB; or why there is none.
      label: the index of its class; -1 where the row has none, and the image is a BadEvent.
      where: (the file, the row's name in it; empty for an image file).
    """

    image: object
    label: int
    where: tuple[str, str]


class Pictures(Protocol):
    """Where images come from."""

    def image_bytes(self, index: int) -> bytes:
        """An encoded image. Raises BadSample."""
        ...

    def where(self, index: int) -> tuple[str, str]:
        """(the file, the row's name in it)."""
        ...


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images with classes, in a fixed order.

    Attributes:
      source: as it was asked for.
      names: of the classes.
      labels: [N] int32, the class of each image; -1 where its row names none, or one that is not among `names`.
      pictures: reads them.
    """

    source: str
    names: tuple[str, ...]
    labels: np.ndarray
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> Item:
        """An image, decoded; a BadEvent in its place if it cannot be read, or has no class."""
        where = self.pictures.where(index)
        try:
            if self.labels[index] == NO_CLASS:
                raise BadSample("no_class", "its row names no class, or none of those that there are")
            image = decode_image(self.pictures.image_bytes(index))
        except BadSample as error:
            image = BadEvent(-1, printable(self.source), *where, error.reason, error.detail)
        return Item(image, int(self.labels[index]), where)

    @property
    def items(self) -> Iterator[Item]:
        """All of them, in order; few are in memory at a time, which threads read ahead."""
        return self.at(range(len(self)))

    def at(self, indices: Iterable[int]) -> Iterator[Item]:
        """Some of them, in this order."""
        return _read_ahead(self.item, indices)

    def first(self, count: int) -> "Labelled":
        """The first so many, spread over all of the source, so that no class is left out for its name; 0 = all."""
        if not 0 < count < len(self):
            return self
        return self.at_places(np.linspace(0, len(self) - 1, count).astype(int))

    def at_places(self, indices: np.ndarray) -> "Labelled":
        """Some of them, in this order, as a set of its own."""
        return dataclasses.replace(self, labels=self.labels[indices], pictures=Chosen(self.pictures, indices))


def _read_ahead(read, indices):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting = collections.deque()
        for index in indices:
            waiting.append(threads.submit(read, index))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some pictures of others."""

    pictures: Pictures
    indices: np.ndarray

    def image_bytes(self, index: int) -> bytes:
        """See `Pictures`."""
        return self.pictures.image_bytes(int(self.indices[index]))

    def where(self, index: int) -> tuple[str, str]:
        """See `Pictures`."""
        return self.pictures.where(int(self.indices[index]))


def open_labelled(
    source: str | os.PathLike, label: str = "", say: Callable[[str], object] = print, outside_root: bool = False
) -> Labelled:
    """The labelled images that a path names.

    Args:
      source: a folder with a folder of images for each class, or any source that training reads.
      label: the field of rows that names the class; empty = the first of `records.CLASS_KEYS` that they have.
      say: called with lines of progress, where a corpus has to be fetched.
      outside_root: the rows' image paths may lead out of their folder.
    Raises:
      UserError: there is nothing there, no image, no class, no such field, or a class twice.
    """
    source = str(source)
    if _is_folder_of_classes(source):
        if label:
            raise UserError(f"--label={label} names a field of rows; {source} has a folder for each class instead")
        return _from_folder(source)
    rows = Rows.open(open_mixture(source_path(source, SPLIT, say), SPLIT, outside_root), source, label)
    names, labels = rows.classes()
    if not len(labels) or (labels == NO_CLASS).all():
        raise UserError(f"{source}: no row names a class under {rows.field!r}; --label=FIELD takes another one")
    check_names(names, source)
    return Labelled(source, names, labels, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files, by their paths."""

    paths: tuple[str, ...]

    def image_bytes(self, index: int) -> bytes:
        """See `Pictures`."""
        return storage.read(self.paths[index])

    def where(self, index: int) -> tuple[str, str]:
        """See `Pictures`."""
        return printable(self.paths[index]), ""


def _is_folder_of_classes(source):
    """Whether it is a folder that neither `prepare` nor TFDS has written."""
    folder = pathlib.Path(source)
    written = ("dataset.json", "dataset_info.json")
    return folder.is_dir() and not any((folder / name).is_file() for name in written)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file is named as an image."""
    return pathlib.PurePath(path).suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _from_folder(source):
    folder = pathlib.Path(source)
    entries = sorted(folder.iterdir())
    classes = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        raise UserError(_no_classes(folder, entries))
    files = [_images_below(entry) for entry in classes]
    filled = [i for i, paths in enumerate(files) if paths]
    if not filled:
        raise UserError(
            f"{source} has {len(classes)} folders and no image below them; images end with {', '.join(IMAGE_SUFFIXES)}"
        )
    classes, files = [classes[i] for i in filled], [files[i] for i in filled]
    names = names_beside(folder, len(classes)) or tuple(_spoken(entry.name) for entry in classes)
    check_names(names, source)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(paths) for paths in files])
    return Labelled(source, names, labels, ImageFiles(tuple(path for paths in files for path in paths)))


def _images_below(folder):
    """The images of a class, those in folders of its folder too, by name."""
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        found += [os.path.join(place, name) for name in sorted(files) if is_image(name) and not name.startswith(".")]
    return found


def _no_classes(folder, entries):
    if not entries:
        return f"{folder} is empty; it needs a folder of images for each class: {folder}/cat/1.jpg, {folder}/dog/1.jpg"
    shown = ", ".join(printable(entry.name) for entry in entries[:SAID])
    return (
        f"{folder} has no folders of classes, but {len(entries):,} files ({shown}{', ...' * (len(entries) > SAID)}); "
        f"put the images of each class into a folder of its name, or name rows: '{folder}/*.jsonl'"
    )


@functools.cache
def _spoken(name: str) -> str:
    """A folder's name as a text: 'golden_retriever' -> 'golden retriever'."""
    return " ".join(name.replace("_", " ").split())
