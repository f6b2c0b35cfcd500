"""Published peaks of the chips that a step may run on. Figures of the makers, per chip, none measured here.

Interconnects are published in two ways. Google gives the "bidirectional inter-chip interconnect bandwidth per chip":
both directions of all links, 2 axes x 2 links on v5e and v6e, 3 x 2 on the others. NVIDIA gives both directions of all
NVLinks. A chip that sends and receives at once sends half of such a figure, and that half is kept here; measured links
give about nine tenths of it (the book: jax-ml.github.io/scaling-book/tpus).
"""

import dataclasses
import re
from collections.abc import Iterable

from hovle_jax.errors import UserError
from hovle_jax.hardware.topology import GENERATIONS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; bandwidths are bytes a second, those of networks one way."""

    name: str
    bf16_flops: float  # dense, a second
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float  # to its neighbours, over all links together
    dcn_bandwidth: float  # to another slice (of a GPU, host): its share of the host's network interfaces
    source: str  # where the figures are published


GB, GIB, TERA = 1e9, 2**30, 1e12
_TPU, _GPU = "https://cloud.google.com/tpu/docs/", "https://www.nvidia.com/en-us/data-center/"

CHIPS = {
    # Its page names neither link nor network: 6 links of 50 GB/s one way are Jouppi et al. 2023's.
    "v4": Chip("TPU v4", 275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, 6.25 * GB, f"{_TPU}v4, arxiv.org/abs/2304.01433"),
    # 400 GB/s both ways; 6.4 Tbit/s for a pod of 256. Its and v6e's "GB" of memory are binary, as libtpu's limit shows.
    "v5e": Chip("TPU v5e", 197 * TERA, 16 * GIB, 819 * GB, 200 * GB, 3.125 * GB, f"{_TPU}v5e"),
    # 1200 GB/s both ways; 50 Gbit/s a chip.
    "v5p": Chip("TPU v5p", 459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, f"{_TPU}v5p"),
    # 800 GB/s both ways; 100 Gbit/s a chip.
    "v6e": Chip("TPU v6e", 918 * TERA, 32 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, f"{_TPU}v6e"),
    # 1200 GB/s both ways; 100 Gbit/s a chip.
    "tpu7x": Chip("TPU7x", 2307 * TERA, 192 * GIB, 7380 * GB, 600 * GB, 12.5 * GB, f"{_TPU}tpu7x"),
    # Half of the figures "with sparsity"; 400 Gbit/s a GPU in a DGX (dgx-h100), 200 in one of A100s (dgx-a100).
    "h100": Chip("NVIDIA H100 SXM", 989.4 * TERA, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, f"{_GPU}h100/"),
    "h200": Chip("NVIDIA H200 SXM", 989.4 * TERA, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, f"{_GPU}h200/"),
    "a100": Chip("NVIDIA A100 SXM 80GB", 312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, f"{_GPU}a100/"),
}  # fmt: skip

# What JAX calls them (`device.device_kind`): patterns in lower case.
_KINDS = (
    (r"tpu v4$", "v4"), (r"tpu v5 lite|tpu v5e", "v5e"), (r"tpu v5p?$", "v5p"), (r"tpu v6 lite|tpu v6e", "v6e"),
    (r"tpu ?7x", "tpu7x"), (r"h200", "h200"), (r"h100.*hbm3|h100 sxm", "h100"), (r"a100-sxm4-80gb", "a100"),
)  # fmt: skip


def key_of(name: str) -> str | None:
    """The key of `CHIPS` by the key itself ('v5e') or by what JAX calls the device ('TPU v5 lite'); None: not known."""
    text = name.strip().lower()
    key = next((key for pattern, key in _KINDS if re.search(pattern, text)), text)
    return key if key in CHIPS else None


def chip_of(name: str) -> Chip:
    """The chip by any of its names, as for `key_of`. Raises UserError where its peaks are not known."""
    key = key_of(name)
    if key is None:
        raise UserError(f"no published peaks are known of {name!r}; known are {', '.join(CHIPS)}")
    return CHIPS[key]


def total_bf16_flops(names: Iterable[str]) -> float | None:
    """The bf16 peaks of several devices together, FLOPs a second; None where that of one is not published, as a CPU's.

    Args:
      names: of each device, as for `key_of`.
    """
    keys = [key_of(name) or "" for name in names]
    devices = lambda key: GENERATIONS[key].devices_per_chip if key in GENERATIONS else 1  # of a chip
    return None if "" in keys else sum(CHIPS[key].bf16_flops / devices(key) for key in keys)
