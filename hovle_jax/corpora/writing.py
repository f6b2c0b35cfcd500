"""A corpus on disk: ArrayRecord files of rows, one a split, beside a description; whole or not at all."""

import contextlib
import hashlib
import json

import msgpack

from hovle_jax.files import whole_folder

DESCRIPTION = "dataset.json"


def shard_name(split):
    return f"{split}-00000-of-00001.array_record"


def pack_row(row):
    """A row as the bytes of one record.

    Args:
      row: the keys of an InternVL annotation (`id`, `image`, `width`, `height`, `conversations`), `caption` and what
        the corpus adds; `image` is an encoded picture, or a list of them, where an annotation has a path.
    """
    return msgpack.packb(row, use_bin_type=True)


def write_corpus(folder, name, rows_by_split, about):
    """Writes `<split>-00000-of-00001.array_record` for each split, and `dataset.json`.

    Args:
      folder: the corpus; it must not exist.
      rows_by_split: {split: iterable of rows}.
      about: what the description says apart from the splits; JSON types.
    Raises:
      UserError: the folder is not empty, or cannot be written.
      ValueError: two rows of a split have one id.
    """
    with whole_folder(folder) as partial:
        splits = {split: _write_split(partial / shard_name(split), rows) for split, rows in rows_by_split.items()}
        text = json.dumps({"name": name, **about, "splits": splits}, indent=1, ensure_ascii=False)
        (partial / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _write_split(path, rows):
    """-> what the description says of it. One record a group: a reader that jumps to a row reads no other."""
    from array_record.python.array_record_module import ArrayRecordWriter

    ids, records = [], hashlib.sha256()
    with contextlib.closing(ArrayRecordWriter(str(path), "group_size:1")) as writer:
        for row in rows:
            record = pack_row(row)
            writer.write(record)
            records.update(record)
            ids.append(row["id"])
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path.name}: {len(ids) - len(set(ids))} rows have the id of another")
    return {
        "file": path.name,
        "rows": len(ids),
        "bytes": path.stat().st_size,
        "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "records_sha256": records.hexdigest(),
    }


def is_written(folder):
    return (folder / DESCRIPTION).is_file()
