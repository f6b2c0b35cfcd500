"""Archives from npm, pip and apt: fetched by version, checked by sha256, and read without unpacking them to disk."""

import contextlib
import dataclasses
import hashlib
import lzma
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

from hovle_jax.errors import UserError

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60


@dataclasses.dataclass(frozen=True)
class Manager:
    """How to get an archive from a package manager.

    Attributes:
      command: downloads an archive into the working folder; REQUIREMENT stands for name and version.
      joint: the characters between name and version.
      suffix: of the archive.
      missing: the remedy if the manager is not installed.
      failed: the remedy if it fetches nothing.
    """

    command: tuple
    joint: str
    suffix: str
    missing: str
    failed: str


# Caches and logs also go into the temporary folder, or nowhere.
MANAGERS = {
    "npm": Manager(
        ("npm", "pack", "--ignore-scripts", "--no-update-notifier", "--cache", ".npm", "REQUIREMENT"),
        "@",
        ".tgz",
        "install Node.js, which brings npm (apt-get install npm)",
        "is npm's registry reachable?",
    ),
    "pip": Manager(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps", "--only-binary=:all:")
        + ("--dest", ".", "REQUIREMENT"),
        "==",
        ".whl",
        "run: python -m ensurepip",
        "is the package index reachable?",
    ),
    "apt": Manager(
        ("apt-get", "download", "REQUIREMENT"),
        "=",
        ".deb",
        "it comes with Debian, and with nothing else that can be installed in its place",
        "run: apt-get update; other releases of Debian carry other versions (this is one of Debian 12)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive pinned by its version and by the sha256 of the file that is downloaded."""

    manager: str  # a key of MANAGERS
    name: str
    version: str
    sha256: str
    licence: str
    megabytes: int

    @property
    def requirement(self) -> str:
        """Name and version, as the manager writes them."""
        return f"{self.name}{MANAGERS[self.manager].joint}{self.version}"


def fetch(package: Package, folder: str | os.PathLike) -> pathlib.Path:
    """Downloads an archive into a new folder below `folder` -> its path.

    Raises:
      UserError: the package manager is missing or fetches nothing, or the archive is not the pinned one.
    """
    manager = MANAGERS[package.manager]
    folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
    command = [package.requirement if part == "REQUIREMENT" else part for part in manager.command]
    try:
        if package.manager == "pip":
            _check_pip()
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{package.requirement} needs {package.manager}, which is missing; {manager.missing}") from None
    archives = sorted(folder.glob(f"*{manager.suffix}"))
    if result.returncode or not archives:
        reason = _last_line(result.stderr) or f"{command[0]} ended with status {result.returncode} and said nothing"
        raise UserError(f"{package.requirement} cannot be fetched ({reason}); {manager.failed}")
    with archives[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{archives[0].name} of {package.requirement} has sha256 {found}, not the pinned {package.sha256}; "
            f"try again, and if it stays so do not use it"
        )
    return archives[0]


def _check_pip():
    """pip is a module of this Python rather than a program, so its absence has to be looked for."""
    import importlib.util

    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError("pip")


def _last_line(text):
    """What went wrong, in one line: the first that says 'error', or else the last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "npm error", "E:"))]
    errors = [line for line in errors if not line.startswith("npm error code")]  # only a code like E404
    return (errors or lines[-1:] or [""])[0]


def members(
    archive: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, bytes]]:
    """The files of a .tgz, a wheel or a .deb whose full names `wanted` accepts, in the archive's order.

    Yields:
      (name, bytes).
    Raises:
      UserError: the archive is damaged or truncated.
    """
    archive = pathlib.Path(archive)
    readers = {".tgz": _tgz_members, ".whl": _zip_members, ".zip": _zip_members, ".deb": _deb_members}
    try:
        yield from readers[archive.suffix](archive, wanted)
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{archive.name} is damaged or truncated ({reason}); fetch it again") from None


def _zip_members(archive, wanted):
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            if not entry.is_dir() and wanted(entry.filename):
                yield entry.filename, file.read(entry)


def _tgz_members(archive, wanted):
    with tarfile.open(archive, "r:gz") as file:
        yield from _tar_members(file, wanted)


def _tar_members(file, wanted):
    for entry in file:
        name = entry.name.removeprefix("./")
        if entry.isfile() and wanted(name):
            yield name, file.extractfile(entry).read()


def _deb_members(archive, wanted):
    with archive.open("rb") as stream:
        name = _seek_data(stream, archive.stat().st_size)
        with contextlib.ExitStack() as stack:
            if name == "data.tar.xz":  # LZMAFile, unlike tarfile's own reader, notices a missing end
                stream = stack.enter_context(lzma.LZMAFile(stream))
            elif name == "data.tar.zst":
                stream = stack.enter_context(_zstandard().ZstdDecompressor().stream_reader(stream))
            yield from _tar_members(stack.enter_context(tarfile.open(fileobj=stream, mode="r|")), wanted)


def _seek_data(stream, size):
    """Seeks to the member of an `ar` archive that contains a Debian package's files -> its name.

    The archive is a magic string, then members: a text header with fixed columns (name 16, times, owner and mode 32,
    length 10, end 2) and the content, padded to an even length.
    """
    if stream.read(len(AR_MAGIC)) != AR_MAGIC:
        raise EOFError("not a Debian package")
    while header := stream.read(AR_HEADER):
        if len(header) < AR_HEADER or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise EOFError("a member's header is broken")
        name, length = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if stream.tell() + length > size:
            raise EOFError(f"{name} ends early")
        if name.startswith("data.tar"):
            return name
        stream.seek(length + length % 2, 1)
    raise EOFError("there is no data.tar in it")


def _zstandard():
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError("this .deb is compressed by zstd; run: pip install zstandard") from None
    return zstandard
