"""Facts about a run: versions and machine, command, commit, parameters, memory."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import hovle_jax
from hovle_jax.system.files import read_json, write_json

FILE_NAME = "facts.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
SEEN = ("tokens_seen", "images_seen", "samples_seen")
HOST_PEAK, DEVICE_PEAK = "memory/host_peak_bytes", "memory/device_peak_bytes"


def write_facts(folder: str | os.PathLike, **facts: Any) -> None:
    """Replaces `folder/facts.json`: this process's command line, the code's commit, and these facts."""
    found: dict[str, Any] = {"command": command_line(), "commit": git_commit()} | facts
    write_json(pathlib.Path(folder) / FILE_NAME, found)


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What `write_facts` wrote into a run's folder; {} without the file."""
    path = pathlib.Path(folder) / FILE_NAME
    return read_json(path) if path.is_file() else {}


def command_line() -> str:
    """The command that started this process, as one would type it."""
    python, *rest = sys.orig_argv
    return shlex.join([os.path.basename(python), *rest])


def git_commit(package: pathlib.Path = pathlib.Path(hovle_jax.__file__).parent) -> str:
    """The commit of the code, with '-dirty' where tracked files differ from it; '' without git.

    Args:
      package: the folder of the code; it must be tracked by the repository, unlike an installed package below its root.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def peak_memory(devices: Iterable) -> dict[str, int]:
    """Peak bytes of this process and, where JAX reports it (TPU, GPU), of the device that used most.

    Args:
      devices: jax.Devices; other hosts' are left out.

    Returns:
      {HOST_PEAK: bytes, DEVICE_PEAK: bytes}, without what is unknown.
    """
    return _host_peak() | _device_peak(devices)


def _host_peak() -> dict[str, int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {HOST_PEAK: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _device_peak(devices: Iterable) -> dict[str, int]:
    import jax

    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in local]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {DEVICE_PEAK: max(peaks)} if peaks else {}


def versions() -> dict[str, str | int | None]:
    """{name: value} of the software and the machine; starts JAX's backend."""
    import jax

    devices = jax.devices()
    found = {"python": platform.python_version(), "hovle_jax": hovle_jax.__version__}
    found |= {name: _package_version(name) for name in PACKAGES}
    return found | {
        "platform": platform.platform(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_count": os.cpu_count(),
    }


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
