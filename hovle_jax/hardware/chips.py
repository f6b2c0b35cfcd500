"""Published peaks of the chips that a step may run on. Figures of the makers, per chip, none measured here.

Interconnects are published in two ways. Google gives the "bidirectional inter-chip interconnect bandwidth per chip":
both directions of all links, 2 axes x 2 links on v5e and v6e, 3 x 2 on the others. NVIDIA gives both directions of all
NVLinks. A chip that sends and receives at once sends half of such a figure, and that half is kept here; measured links
give about nine tenths of it (jax-ml.github.io/scaling-book/tpus).
"""

import dataclasses
import re

from hovle_jax.errors import UserError
from hovle_jax.hardware.topology import GENERATIONS, Topology


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      bf16_flops: dense, a second.
      hbm_bytes: of memory.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that it can send to its neighbours over all links together, one way.
      ici_links: how many these are; 0 = a switch, which serves any pattern.
      dcn_bandwidth: bytes a second that it can send to another slice (or host, for a GPU), one way: its share of the
        host's network interfaces.
      source: where the figures are published.
      dcn_source: where that of the network is, if elsewhere.
    """

    name: str
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    source: str
    dcn_source: str = ""

    def slice_bandwidth(self, topology: Topology | None = None):
        """Bytes a second that a chip sends in a collective over a whole slice, whose short axes are no rings."""
        if topology is None or not self.ici_links:
            return self.ici_bandwidth
        return self.ici_bandwidth * topology.links / self.ici_links


GB, GIB, TERA = 1e9, 2**30, 1e12
_DOCS = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

CHIPS = {
    # The documentation of v4 names neither link nor network: 6 links of 50 GB/s one way are Jouppi et al. 2023's.
    "v4": Chip(
        "TPU v4", 275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, 6, 6.25 * GB,
        _DOCS + "v4, https://arxiv.org/abs/2304.01433", "https://jax-ml.github.io/scaling-book/tpus",
    ),
    # 400 GB/s both ways; 6.4 Tbit/s for a pod of 256. Its and v6e's "GB" of memory are binary, as libtpu's limit shows.
    "v5e": Chip(
        "TPU v5e", 197 * TERA, 16 * GIB, 819 * GB, 200 * GB, 4, 3.125 * GB, _DOCS + "v5e",
    ),
    # 1200 GB/s both ways; 50 Gbit/s a chip.
    "v5p": Chip(
        "TPU v5p", 459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, 6, 6.25 * GB,
        _DOCS + "v5p",
    ),
    # 800 GB/s both ways; 100 Gbit/s a chip.
    "v6e": Chip(
        "TPU v6e", 918 * TERA, 32 * GIB, 1638 * GB, 400 * GB, 4, 12.5 * GB, _DOCS + "v6e",
    ),
    # 1200 GB/s both ways; 100 Gbit/s a chip.
    "tpu7x": Chip(
        "TPU7x", 2307 * TERA, 192 * GIB, 7380 * GB, 600 * GB, 6, 12.5 * GB, _DOCS + "tpu7x",
    ),
    # Half of the figures "with sparsity"; 400 Gbit/s a GPU in a DGX.
    "h100": Chip(
        "NVIDIA H100 SXM", 989.4 * TERA, 80 * GB, 3350 * GB, 450 * GB, 0, 50 * GB,
        _NVIDIA + "h100/", _NVIDIA + "dgx-h100/",
    ),
    "h200": Chip(
        "NVIDIA H200 SXM", 989.4 * TERA, 141 * GB, 4800 * GB, 450 * GB, 0, 50 * GB,
        _NVIDIA + "h200/", _NVIDIA + "dgx-h200/",
    ),
    # 200 Gbit/s a GPU in a DGX.
    "a100": Chip(
        "NVIDIA A100 SXM 80GB", 312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 0, 25 * GB,
        _NVIDIA + "a100/", _NVIDIA + "dgx-a100/",
    ),
}  # fmt: skip

# What JAX calls them (`device.device_kind`): patterns in lower case.
_KINDS = (
    (r"tpu v4$", "v4"), (r"tpu v5 lite|tpu v5e", "v5e"), (r"tpu v5p?$", "v5p"), (r"tpu v6 lite|tpu v6e", "v6e"),
    (r"tpu ?7x", "tpu7x"), (r"h200", "h200"), (r"h100.*hbm3|h100 sxm", "h100"), (r"a100-sxm4-80gb", "a100"),
)  # fmt: skip


def chip_of(name) -> Chip:
    """The chip by its key ('v5e', 'h100') or by what JAX calls the device ('TPU v5 lite').

    Raises:
      UserError: none of these.
    """
    key = key_of(name)
    if key is None:
        raise UserError(f"no published peaks are known of {name!r}; known are {', '.join(CHIPS)}")
    return CHIPS[key]


def total_bf16_flops(names):
    """The bf16 peaks of several devices together, FLOPs a second; None where that of one is not published, as a CPU's.

    Args:
      names: of each device, as for `chip_of`.
    """
    keys = [key_of(name) for name in names]
    return None if None in keys else sum(CHIPS[key].bf16_flops / _devices(key) for key in keys)


def key_of(name):
    """The key of CHIPS by any of a chip's names, as for `chip_of`; None where its peaks are not known."""
    text = name.strip().lower()
    key = next((key for pattern, key in _KINDS if re.search(pattern, text)), text)
    return key if key in CHIPS else None


def _devices(key):
    """JAX devices per chip."""
    return GENERATIONS[key].devices_per_chip if key in GENERATIONS else 1
