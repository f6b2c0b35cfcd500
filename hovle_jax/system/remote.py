"""A folder at a URL (gs://, s3://, whatever fsspec opens): what lies there, and its files one by one."""

import base64
import concurrent.futures
import hashlib
import logging
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from hovle_jax.errors import UserError
from hovle_jax.system.files import reason_of

THREADS = 8  # files that travel at a time
PROBE = ".can_be_written"
T = TypeVar("T")


def is_url(place: str | os.PathLike) -> bool:
    """Whether a file or folder is given by a URL."""
    return "://" in str(place)


class Entry(NamedTuple):
    """A file at a URL.

    Attributes:
      size: bytes.
      version: another one where it has been written again.
      md5: of its content, where the service keeps one; ''.
    """

    size: int
    version: str
    md5: str


class Remote:
    """A folder at a URL.

    Every method raises UserError, with what to check, where the service cannot do it.

    Attributes:
      url: without a slash at its end.
    """

    def __init__(self, url: str, opened: tuple[Any, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = opened or _opened(self.url)

    def below(self, name: str) -> "Remote":
        """A folder in it."""
        return Remote(f"{self.url}/{name}", (self._fs, f"{self._root}/{name}"))

    def check_writable(self) -> None:
        """Raises UserError where nothing can be written."""
        probe = f"{PROBE}_{secrets.token_hex(4)}"  # several hosts may do the same
        self.write(probe, b"x")
        self.remove([probe])

    def entries(self) -> dict[str, Entry]:
        """{path below the folder: file} of all files."""
        return self._try("be listed", self._entries)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._try("be listed", lambda: self._fs.exists(f"{self._root}/{name}"))

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        return self._try("be read", lambda: self._fs.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file; the service shows it whole, or the one before."""
        self._try("be written", lambda: self._fs.pipe_file(self._made(name), content))

    def send(self, folder: pathlib.Path, names: Iterable[str]) -> None:
        """Writes files of a local folder under the same names."""
        self._each("be written", lambda name: self._fs.put_file(str(folder / name), self._made(name)), names)

    def send_growing(self, folder: pathlib.Path, names: Iterable[str]) -> None:
        """The same of small files that may grow meanwhile: what is there now."""
        self._each("be written", lambda n: self._fs.pipe_file(self._made(n), (folder / n).read_bytes()), names)

    def take(self, folder: pathlib.Path, names: Iterable[str]) -> None:
        """Copies files into a local folder under the same names."""

        def take(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{self._root}/{name}", str(folder / name))

        self._each("be read", take, names)

    def copy(self, name: str, to: str) -> None:
        """Copies a file within the folder, in the service."""
        self._try("be written", lambda: self._fs.cp_file(f"{self._root}/{name}", self._made(to)))

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; not an error where one is gone."""

        def remove(name):
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm_file(f"{self._root}/{name}")

        self._each("be written", remove, names)

    def remove_all(self, first: str) -> None:
        """Removes the folder with all that is in it.

        Args:
          first: the file to begin with: the list, without which what is left is no checkpoint and no model.
        """

        def remove():
            if self._fs.exists(self._root):
                self._fs.rm(self._root, recursive=True)

        self.remove([first])
        self._try("be written", remove)

    def sha256(self, name: str) -> str:
        """Of a file's content, which is read for it."""

        def digest():
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self._try("be read", digest)

    def path_for_arrays(self) -> str:
        """Where Orbax writes arrays by itself.

        Raises:
          UserError: Orbax cannot write to such a URL.
        """
        if self.url.startswith("gs://"):
            return self.url
        if self.url.startswith("file://"):
            return self._root
        raise UserError(
            f"several hosts write one checkpoint together, and {self.url} is not gs://, where they can; give a gs:// "
            "URL, or a folder that all of them share"
        )

    def _entries(self):
        if not self._fs.exists(self._root):
            return {}
        found = self._fs.find(self._root, detail=True)
        entries = {path.removeprefix(self._root).strip("/"): _entry(info) for path, info in found.items()}
        return {name: entry for name, entry in entries.items() if name and not name.startswith(PROBE)}

    def _made(self, name):
        """The full name of a file, in a folder that exists; no effect where there are no folders."""
        full = f"{self._root}/{name}"
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        return full

    def _each(self, what: str, do: Callable[[str], object], names: Iterable[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            self._try(what, lambda: list(threads.map(do, names)))

    def _try(self, what: str, do: Callable[[], T]) -> T:
        try:
            return do()
        except Exception as error:  # each service's own
            raise UserError(
                f"{self.url} cannot {what}: {reason_of(error)}; check the URL and the credentials (for gs://: gcloud "
                "auth application-default login, or a service account)"
            ) from error


def _entry(info: dict[str, Any]) -> Entry:
    """From what fsspec says of a file; each service has names of its own for versions."""
    version = next((info[key] for key in ("generation", "ETag", "mtime", "created") if info.get(key)), "")
    md5 = base64.b64decode(info["md5Hash"]).hex() if info.get("md5Hash") else ""
    return Entry(int(info["size"]), str(version), md5)


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    if "::" in url:
        raise UserError(f"{url}: a work folder is one URL, not a chain of them")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it says what it also raises, and each try before
    try:
        found, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{url} cannot be opened: {reason_of(error)}; install what opens it (gs://: pip install gcsfs, s3://: "
            "s3fs), or give a folder"
        ) from None
    except Exception as error:  # credentials that are broken
        raise UserError(f"{url} cannot be opened: {reason_of(error)}") from error
    return found, os.fspath(root).rstrip("/")
