"""Which files and URLs a row's image paths may name.

Rows are written by strangers; the folder that they are read in is the user's choice. So a path stays below that folder,
whatever links lie on the way, and a URL is one of few schemes. `data.outside_root` allows more to trusted rows.
"""

import os
import stat
import urllib.parse

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import storage
from hovle_jax.system import fetching

SCHEMES = ("gs", "s3", "https")
WEB = ("http", "https")
LARGEST_IMAGE = 2**26  # bytes of an encoded image
SECONDS = 30.0  # to fetch an image of the web
SHOWN = 200  # characters of a refused path in a report
REMEDY = "allow it with data.outside_root=True (--outside_root) if the rows may read any file"


def named(path: str, root: str = "", outside_root: bool = False) -> str:
    """A row's path, below `root` unless it is a URL: what `read` takes. Nothing is opened.

    Args:
      root: the folder that paths are relative to, also a URL; empty = the working folder.
      outside_root: paths may lead out of `root`, and URLs may be of http.
    Raises:
      BadSample: it may not be read.
    """
    if storage.is_url(path):
        _check_url(path, outside_root)
        return path
    if storage.is_url(root) and not _local(root):
        return _below_url(path, root)
    joined = storage.join(_local(root) or root, path)
    if not (outside_root or _is_below(os.path.abspath(joined), os.path.abspath(_local(root) or root or "."))):
        _resolved(joined, root, outside_root)  # an absolute path may still be below the root that a link names
    return joined


def read(path: str, root: str = "", outside_root: bool = False) -> bytes:
    """The bytes of an image that `named` gave. Raises BadSample if it may not be read, is missing or too large."""
    if not storage.is_url(path):
        return _read_local(path, root, outside_root)
    if storage.is_url(root) and _is_below(path, root):
        return storage.read(path)
    _check_url(path, outside_root)
    if path.partition("://")[0].lower() not in WEB:
        return _read_bounded(path)
    try:
        return fetching.fetch(path, LARGEST_IMAGE, SECONDS)
    except fetching.CannotFetch as error:
        raise BadSample("refused_url" if error.private else "unreadable_file", f"{path[:SHOWN]}: {error}") from None


def _read_bounded(url):
    data = storage.read(url, 0, LARGEST_IMAGE + 1)
    if len(data) > LARGEST_IMAGE:
        raise BadSample("unreadable_file", f"{url[:SHOWN]} has more than {LARGEST_IMAGE:,} bytes")
    return data


def local_file(path: str, root: str, outside_root: bool = False) -> str:
    """The file that a row's path names, every link followed. Raises BadSample for a URL or what may not be read."""
    if storage.is_url(path):
        raise BadSample("refused_url", f"{path[:SHOWN]}: only files of this machine are read here")
    return _resolved(storage.join(root, path), root, outside_root)


def _read_local(path, root, outside_root):
    real = _resolved(path, root, outside_root)
    try:
        status = os.stat(real)
    except (OSError, ValueError):
        return storage.read(real)  # which says what is wrong
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise BadSample("unreadable_file", f"{path[:SHOWN]} is a device or a pipe, no file")
    if status.st_size > LARGEST_IMAGE:
        raise BadSample(
            "unreadable_file", f"{path} has {status.st_size:,} bytes, and an image {LARGEST_IMAGE:,} at most"
        )
    return storage.read(real)


def _resolved(path, root, outside_root):
    """The file itself, every link followed. Raises BadSample if it is not below `root`."""
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:  # a zero byte
        raise BadSample("unreadable_file", f"{path[:SHOWN]}: {error}") from None
    within = os.path.realpath(_local(root) or root or ".")
    if not (outside_root or _is_below(real, within)):
        raise BadSample("outside_root", f"{path[:SHOWN]} is not below {within}; {REMEDY}")
    return real


def _local(root):
    """The folder of a file:// URL; empty for others."""
    scheme, colon, folder = str(root).partition("://")
    return folder if colon and scheme.lower() in ("file", "local") else ""


def _is_below(path, root):
    return path == root or path.startswith(root.rstrip("/") + "/")


def _below_url(path, root):
    steps = urllib.parse.unquote(path).replace("\\", "/").split("/")
    if path.startswith("/") or ".." in steps or "::" in path:
        raise BadSample("outside_root", f"{path[:SHOWN]} is not below {root}")
    return storage.join(root, path)


def _check_url(url, outside_root):
    allowed = (*SCHEMES, "http") if outside_root else SCHEMES
    if url.partition("://")[0].lower() not in allowed or "::" in url:
        raise BadSample("refused_url", f"{url[:SHOWN]}: a row may name URLs of {', '.join(allowed)}, unchained")
