"""Converts data in any format that `sources` reads into a corpus of ArrayRecord files that contain the images.

A large file is quicker to read in random order than millions of small ones, and easier to copy completely.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from hovle_jax.corpora.writing import CorpusWriter, describe
from hovle_jax.data.bad_samples import BadSample, BadSamples, read_bad_samples
from hovle_jax.data.files import storage
from hovle_jax.data.files.mixture import Entry, open_mixture
from hovle_jax.data.files.records import CLASS_KEYS, class_text, parse
from hovle_jax.data.images import MAX_PIXELS, decoded_image
from hovle_jax.errors import UserError
from hovle_jax.system.files import whole_folder
from hovle_jax.system.progress import track


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    root: str = "",
    held_out: float = 0.0,
    ceiling: float = 0.01,
    say: Callable[[str], object] = print,
    outside_root: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, int]:
    """Writes `train` and, if a share of the samples is held out, `test`.

    Args:
      source: anything that data.source may name, or a JSON list of rows.
      folder: where the corpus goes; it must not exist.
      root: the folder that image paths are relative to; empty = as a meta file says, or the source's folder.
      held_out: the share of samples that go to `test`, chosen by their ids.
      ceiling: the share of samples that may be unusable.
      outside_root: image paths may lead out of `root`.
      max_pixels: an image of more is a bad sample.
    Returns:
      {split: number of rows}.
    Raises:
      UserError: there is nothing to read, or there are too many bad samples.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out={held_out} is a share of samples; set it between 0 and 1")
    with tempfile.TemporaryDirectory() as temporary:
        listed = rows_of_json_list(source, temporary)
        entries = open_mixture(listed or source, outside_root=outside_root)
        root = root or (str(source).rpartition("/")[0] or "." if listed else "")
        if root:
            entries = [dataclasses.replace(e, source=dataclasses.replace(e.source, root=root)) for e in entries]
        return _convert(entries, source, folder, held_out, ceiling, say, max_pixels)


def _convert(entries: list[Entry], source, folder, held_out, ceiling, say, max_pixels):
    total = sum(entry.used for entry in entries)
    with whole_folder(folder) as partial:
        bad = BadSamples(partial, ceiling, folder_remains=False)
        with CorpusWriter(partial) as writer:
            for written in track(
                _rows(entries, held_out, bad, max_pixels), say, pathlib.Path(folder).name, "samples", total
            ):
                if written is not None:
                    writer.add(*written)
        if not writer.splits:
            raise UserError(
                f"none of the {total} samples of {source} can be used; the first: {read_bad_samples(partial)[0]}"
            )
        describe(partial, {"name": pathlib.Path(folder).name, "made_of": str(source), "splits": writer.splits})
    return {split: values["rows"] for split, values in writer.splits.items()}


def _rows(entries: list[Entry], held_out, bad, max_pixels):
    """Yields (split, row), or None for a bad sample. Decodes every image, so that only readable ones are written."""
    for entry in entries:
        for i in range(entry.used):
            try:
                row = _row(entry.source, i, max_pixels)
            except BadSample as error:
                event = entry.source.event(i, error.reason, error.detail)
                bad.add([event], event.samples)
                yield None
                continue
            bad.add([], 1)
            number = int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8], "big")
            yield ("test" if number < held_out * 2**64 else "train"), row


def _row(source, index, max_pixels):
    """A row in InternVL's form, with its images as the bytes of their files."""
    original = source[index]
    record = parse(original, source.root, source.outside_root)
    row: dict[str, Any] = {"id": f"{source.name}/{original.get('id', index)}"}
    if record.images:
        data = [record.image_bytes(k) for k in range(len(record.images))]
        sizes = [_size_of_decoded(d, max_pixels) for d in data]
        row |= {"image": data, "width": [w for w, _ in sizes], "height": [h for _, h in sizes]}
    if record.turns:
        messages = [{"from": "system", "value": record.system}] if record.system else []
        for question, answer in record.turns:
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row["conversations"] = messages
    row |= {key: text for key in CLASS_KEYS if (text := class_text(original.get(key))) is not None}
    return row | {key: value for key, value in (("caption", record.caption), ("text", record.text)) if value}


def _size_of_decoded(data, max_pixels):
    with decoded_image(data, max_pixels=max_pixels) as image:
        return image.size


def rows_of_json_list(path: str | os.PathLike, folder: str | os.PathLike) -> pathlib.Path | None:
    """Rewrites a JSON list of rows (LLaVA's format) as a jsonl file in `folder` -> its path, else None."""
    if not str(path).endswith(".json"):
        return None
    try:
        rows = json.loads(storage.stream(storage.expand(path)[0]).read())
    except ValueError:  # `open_mixture` reports what is wrong with it
        return None
    if not isinstance(rows, list):
        return None
    written = pathlib.Path(folder) / f"{pathlib.Path(path).stem}.jsonl"
    with written.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return written
