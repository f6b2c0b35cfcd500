"""Which of JAX's platforms this machine has, found out from files alone: no backend is started, JAX is not imported.

If libtpu is installed, JAX tries it first. Without a TPU, libtpu then writes five lines of errors before JAX falls back
to the CPU. So the CPU is chosen beforehand.
"""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

# Google's PCI vendor number. Its network cards (class 0x02) and disks (0x01) have it too.
GOOGLE, OTHER_CLASSES = "0x1ae0", ("0x01", "0x02")
# Set by Cloud TPU, GKE, Colab or a user if there is a TPU. (If there is none, JAX itself sets TPU_SKIP_MDS_QUERY.)
TPU_VARIABLES = (
    "TPU_NAME",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_VISIBLE_CHIPS",
    "COLAB_TPU_ADDR",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "JAX_FORCE_TPU_INIT",
)


def has_tpu(root: str | pathlib.Path = "/") -> bool:
    """Whether anything shows a TPU: a device file, a PCI device, or the environment.

    Args:
      root: the folder that contains dev/ and sys/.
    """
    if any(os.environ.get(name) for name in TPU_VARIABLES):
        return True
    root = pathlib.Path(root)
    if any(glob.glob(str(root / pattern)) for pattern in ("dev/accel*", "dev/vfio/[0-9]*")):
        return True
    return any(_is_tpu(vendor.parent) for vendor in root.glob("sys/bus/pci/devices/*/vendor"))


def _is_tpu(device: pathlib.Path) -> bool:
    read = lambda name: (device / name).read_text().strip()
    try:
        return read("vendor") == GOOGLE and not read("class").startswith(OTHER_CLASSES)
    except OSError:  # a device that has just been removed
        return False


def has_other_plugins() -> bool:
    """Whether a plugin for JAX is installed, such as CUDA's."""
    return bool(importlib.metadata.entry_points(group="jax_plugins"))


def choose_cpu(root: str | pathlib.Path = "/") -> bool:
    """Sets JAX_PLATFORMS=cpu, for this process and its children, if JAX would look for a TPU in vain.

    Nothing is changed if JAX_PLATFORMS is set already, or if another plugin is installed: there may be a GPU.

    Returns:
      Whether it was set.
    """
    if os.environ.get("JAX_PLATFORMS") or has_other_plugins():
        return False
    if importlib.util.find_spec("libtpu") is None or has_tpu(root):
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # JAX has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    return True
