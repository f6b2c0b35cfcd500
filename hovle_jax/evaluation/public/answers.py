"""A file that answers are added to as they come, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.evaluation.public.tsv import Row, Table
from hovle_jax.system.json_lines import whole_lines


class AnswerFile:
    """JSON lines: what the answers are of, then {"index", "prediction"} each.

    Args:
      path: of the file, which need not exist.
      about: what the answers depend on; those of another model, file or setting are not taken.

    Raises UserError where the file is of something else or cannot be written.
    """

    def __init__(self, path: pathlib.Path, about: Mapping[str, Any]):
        self.path = path
        self.answers: dict[str, str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = whole_lines(path)
            if lines:
                self._take(lines, about)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; name another folder with --out") from None
        if not lines:
            self._write({"about": dict(about)})

    def add(self, index: str, prediction: str) -> None:
        """Writes an answer."""
        self.answers[index] = prediction
        self._write({"index": index, "prediction": prediction})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that have no answer yet."""
        return [row for row in rows if row.index not in self.answers]

    def _take(self, lines, about):
        try:
            before, *rest = map(json.loads, lines)
            before, self.answers = before["about"], {one["index"]: one["prediction"] for one in rest}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is no file of answers to a TSV: name another folder with --out") from None
        differs = [f"{name}={before.get(name)!r}, not {value!r}" for name, value in about.items()
                   if before.get(name) != value]  # fmt: skip
        differs += [f"{name}={value!r}" for name, value in before.items() if name not in about]
        if differs:
            raise UserError(
                f"{self.path} has answers of another evaluation ({'; '.join(differs)}): delete it, or name another "
                "folder with --out"
            )

    def _write(self, value):
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()


def fingerprint(table: Table) -> str:
    """Changes with any cell but the images."""
    digest = hashlib.sha256()
    for row in table.rows:
        digest.update(json.dumps([dict(row.cells), row.place >= 0]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
