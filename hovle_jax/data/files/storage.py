"""Files of data sets, local or at any URL that fsspec knows: their names, bytes and fingerprints."""

import glob
import hashlib
import json
import os
import pathlib
import queue
import re
import threading
import time
from typing import Any

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.errors import UserError
from hovle_jax.system.remote import is_url

LARGEST = 2**31  # bytes of a file that is read as a whole; a path given by mistake may be that of a film
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # shards-{00000..00127}.tar
RETRY_AFTER = (0.5, 2.0, 8.0)  # seconds between the attempts to read a URL
URL_SECONDS = 120.0  # of each attempt


def _file_system(path):
    """fsspec's file system and the path in it. Raises UserError for an unknown protocol or a missing package."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be opened: {error}") from None


def expand(pattern: str | os.PathLike) -> list[str]:
    """The files that a path, a glob pattern or a numbered range names, in order.

    Raises:
      UserError: there are none.
    """
    pattern = str(pattern)
    ranged = RANGE.search(pattern)
    if ranged:
        first, last = ranged.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise UserError(f"{pattern}: the range {ranged.group()} is empty; the smaller number comes first")
        return [p for n in numbers for p in expand(RANGE.sub(f"{n:0{len(first)}d}", pattern, count=1))]
    if is_url(pattern):
        fs, path = _file_system(pattern)
        found = [fs.unstrip_protocol(p) for p in sorted(fs.glob(path))] if glob.has_magic(path) else [pattern]
        exists = found and fs.exists(path) if not glob.has_magic(path) else bool(found)
    else:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not os.path.exists(pattern) else [pattern]
        # A link without its file, among the files of a pattern, is one of them that cannot be read.
        exists = bool(found) if found != [pattern] else os.path.exists(pattern)
    if not exists:
        raise UserError(f"no file at {pattern}; check the path, or the annotation that names it")
    return found


def join(root: str | os.PathLike, path: str) -> str:
    """`path` below `root`, unless it is absolute or a URL."""
    if not root or is_url(path) or os.path.isabs(path):
        return path
    return f"{str(root).rstrip('/')}/{path}"


def read(path: str | os.PathLike, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file. Raises BadSample if it is missing or cannot be read."""
    if is_url(path):
        return _read_url(path, offset, None if length is None else offset + length)
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if offset:
                file.seek(offset)
            held = os.fstat(file.fileno()).st_size - offset
            size = max(0, held if length is None else min(length, held))  # whatever a header states
            if size > LARGEST:
                raise BadSample("unreadable_file", f"{path} has {size:,} bytes, and at most {LARGEST:,} are read")
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):  # one call reads 2 GiB at most
                data += more
            return data
    except FileNotFoundError:
        raise BadSample("missing_file", f"{path} does not exist") from None
    except IsADirectoryError:
        raise BadSample("missing_file", f"{path} is a folder") from None
    except PermissionError:
        raise BadSample("unreadable_file", f"{path}: no permission") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise BadSample("unreadable_file", f"{path}: {error}") from None


def _open_at_once(path, flags):
    """Opens a pipe as if it were an empty file, instead of waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_url(path, start, end) -> Any:
    """Retries what may be a failure of the network, for which no sample should be replaced."""
    for wait in (*RETRY_AFTER, None):
        try:
            fs, inner = _file_system(path)
            return _within(URL_SECONDS, lambda fs=fs, inner=inner: fs.cat_file(inner, start=start, end=end))
        except FileNotFoundError:
            raise BadSample("missing_file", f"{path} does not exist") from None
        except UserError as error:
            raise BadSample("unreadable_file", f"{path}: {error}") from None
        except Exception as error:  # noqa: BLE001 (each file system has errors of its own)
            if wait is None:
                raise BadSample("unreadable_file", f"{path}: {error}") from None
            time.sleep(wait)


def _within(seconds, function):
    """function(), in a thread that is left behind when it takes longer: no file system has a limit of its own."""
    results = queue.SimpleQueue()

    def run():
        try:
            results.put((function(), None))
        except Exception as error:  # noqa: BLE001 (raised below)
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result


def stream(path: str | os.PathLike) -> Any:
    """A binary file, opened for sequential reading, that can seek."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = _file_system(path)
    return fs.open(inner, "rb", block_size=2**22)


def fingerprint(path: str | os.PathLike) -> list:
    """Identifies a file as it is now, for cached indexes: its name, its size and the time of its last change."""
    if is_url(path):
        fs, inner = _file_system(path)
        info = fs.info(inner)
        changed = next(
            (str(info[key]) for key in ("etag", "ETag", "mtime", "updated", "LastModified") if key in info), ""
        )
        return [str(path), info.get("size"), changed]
    status = os.stat(path)
    files = [status.st_size, status.st_mtime_ns]
    if os.path.isdir(path):
        entries = sorted(pathlib.Path(path).rglob("*"))
        files = [[str(e), e.stat().st_size, e.stat().st_mtime_ns] for e in entries if e.is_file()]
    return [os.path.abspath(path), files]


def hash_key(*parts: object) -> str:
    """A short hash of anything that JSON can write, by which cache folders and open readers are named."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
