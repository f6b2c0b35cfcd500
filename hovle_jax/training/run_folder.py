"""A run's folder: its config, and whether what lies there belongs to this run."""

import os
import pathlib
import tempfile

from hovle_jax.config import RUN_ONLY_KEYS, RunConfig, differences
from hovle_jax.data.batch import CorpusSummary
from hovle_jax.errors import UserError
from hovle_jax.system.files import read_json, write_json

MOST_NAMED = 4  # keys that differ
WRITTEN_AGAIN = "remove that file, and the same command writes it again"


def open_run_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Makes a run's folder. Raises UserError when it cannot be written to."""
    folder = pathlib.Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder with --workdir") from None
    return folder


def save_config(folder: pathlib.Path, config: RunConfig) -> None:
    write_json(folder / "config.json", config.to_dict())


def check_same_config(
    folder: pathlib.Path, config: RunConfig, remedy: str = "or remove that folder to start over"
) -> None:
    """Raises UserError when the folder holds a run of another config: to go on with it would mix two."""
    path = folder / "config.json"
    if not path.is_file():
        return
    # Read through the dataclass: a key that is newer than the run has its default.
    old, new = RunConfig.from_dict(read_json(path, ["stage"], WRITTEN_AGAIN)).to_dict(), config.to_dict()
    found = [d for d in differences(old, new) if d[0].split(".")[0] not in RUN_ONLY_KEYS]
    if found:
        named = ", ".join(f"{key}={before!r}, not {after!r}" for key, before, after in found[:MOST_NAMED])
        more = f" (and {len(found) - MOST_NAMED} more keys)" if len(found) > MOST_NAMED else ""
        raise UserError(f"{folder} holds a run with {named}{more}; choose another --workdir, {remedy}")


def check_same_data(folder: pathlib.Path, summary: CorpusSummary) -> None:
    """Notes what a run reads. Raises UserError if it would resume with other data than it began with."""
    path, has_steps = folder / "data.json", any((folder / "checkpoints").glob("[0-9]*"))
    noted = {"digest": summary.digest, "samples": summary.samples, "summary": summary.text}
    if has_steps and path.is_file():
        before = read_json(path, ["digest", "samples"], WRITTEN_AGAIN)
        if before["digest"] != summary.digest:
            raise UserError(
                f"the data of {folder} is not what it was when the run began ({before['samples']:,} samples then, "
                f"{summary.samples:,} now, or others, or mended ones); bring it back, or choose another --workdir"
            )
    write_json(path, noted)
