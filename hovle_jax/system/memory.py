"""How much memory is free, of this machine and of a device."""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

from hovle_jax.system import malloc

# Files of a control group, in its second and first version: limit, what counts against it, what that is made of.
GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
CACHED = re.compile(r"^(?:in)?active_file (\d+)$", re.MULTILINE)  # files in memory, which give way


def free_on_host(root: str | pathlib.Path = "/") -> int | None:
    """Bytes that this process can still take: what Linux says is available, or less where its control group has less.

    Args:
      root: the folder that contains proc/ and sys/.
    Returns:
      None where it is not known.
    """
    root = pathlib.Path(root)
    found = re.search(r"MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"))
    if not found:
        return None
    left = [limit - used for limit, used in _groups(root / "sys/fs/cgroup")]
    return max(0, min(1024 * int(found[1]), *left)) if left else 1024 * int(found[1])


def _groups(folder):
    for names in GROUPS:
        limit, used, kinds = (_text(folder / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():  # no limit is the word 'max', or a number beyond all machines
            yield int(limit), int(used) - sum(map(int, CACHED.findall(kinds)))


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def free_on(devices: Iterable[Any]) -> int | None:
    """Bytes free on that of these jax.Devices which has least; devices of the CPU share the host's memory.

    Returns:
      None where it is not known.
    """
    found = [_free(device) for device in devices]
    known = [free for free in found if free is not None]
    return min(known) if known and len(known) == len(found) else None


def _free(device):
    if device.platform == "cpu":
        host = free_on_host()
        return None if host is None else host + malloc.kept_bytes()
    stats = device.memory_stats() or {}
    known = "bytes_limit" in stats and "bytes_in_use" in stats
    return stats["bytes_limit"] - stats["bytes_in_use"] if known else None
