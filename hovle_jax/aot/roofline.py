"""How fast a step can be at best on a chip: the times of its products, its memory traffic and its network.

The largest of them bounds the step from below, as if the others hid behind it entirely; the MFU ceiling follows. All of
them are lower bounds: peaks are the published ones, collectives keep every link of the slice busy (one along a single
axis of the torus alone keeps that axis' links busy, and takes longer), memory is read and written as little as
`hbm_bytes` says.
"""

import dataclasses

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import BatchShape
from hovle_jax.hardware.chips import Chip
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.config import StackConfig
from hovle_jax.training.flops import StepFlops
from hovle_jax.training.stages import find


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by what bounds it, and what follows.

    Attributes:
      compute: hardware FLOPs, recomputation included, at the bf16 peak.
      memory: HBM traffic at its bandwidth.
      ici: bytes between the chips of a slice.
      dcn: bytes between slices.
      mfu: the ceiling: model FLOPs / (peak x chips x seconds).
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    mfu: float

    @property
    def seconds(self):
        return max(self.times.values())

    @property
    def bottleneck(self):
        """'compute', 'memory', 'ici' or 'dcn'."""
        return max(self.times, key=self.times.get)

    @property
    def times(self):
        return {name: getattr(self, name) for name in ("compute", "memory", "ici", "dcn")}


def roofline(flops: StepFlops, chip: Chip, chips, hbm=0.0, ici=0.0, dcn=0.0, topology: Topology | None = None):
    """The bounds of one step.

    Args:
      flops: of the whole step, all chips together.
      chips: how many there are, over all slices.
      hbm, ici, dcn: bytes that each chip reads and writes, sends within its slice, and to others.
      topology: of a slice, where its short axes are no rings; None = all links serve.
    """
    compute = flops.hardware / (chips * chip.bf16_flops)
    times = dict(
        compute=compute,
        memory=hbm / chip.hbm_bandwidth,
        ici=ici / chip.slice_bandwidth(topology),
        dcn=dcn / chip.dcn_bandwidth,
    )
    return Roofline(**times, mfu=flops.model / (chips * chip.bf16_flops * max(times.values())))


def network_bytes(found, devices_per_chip=1):
    """Collectives of a program -> (bytes that a chip sends within its slice, to other slices), one execution of it.

    Where a chip is two devices, what these say to each other is counted too.
    """
    dcn = sum(c.bytes for c in found if c.crosses_slices)
    ici = sum(c.bytes for c in found if not c.crosses_slices)
    return ici * devices_per_chip, dcn * devices_per_chip


def hbm_bytes(config: RunConfig, chips, parameters, trained, rows=None, microbatches=1):
    """A lower bound of the bytes that a chip reads and writes in a step whose parameters are sharded over all chips.

    - weights in bf16, gathered for the forward and for the backward pass of each microbatch: written, then read;
    - float32 parameters, both moments and the gradient of a chip's share: read and written once;
    - in the decoder layers, bf16 operands and results of the products (`layer_elements`), in the forward pass, both
      gradients, and again where layers are rematerialised. Towers, logits and all else count nothing.

    Args:
      parameters: how many the step reads.
      trained: how many of them have an optimizer state.
    """
    rows = config.data.batch_size if rows is None else rows
    weights = 2 * 2 * 2 * parameters * microbatches / max(1, config.mesh.tensor)
    state = 2 * 4 * 4 * trained / chips
    passes = 3 if config.execution.remat == "none" else 4
    elements = sum(layer_elements(stack) * stack.num_layers * length for stack, length in decoder_stacks(config))
    return weights + state + passes * 2 * elements * rows / chips


def layer_elements(c: StackConfig):
    """Elements a token that a decoder layer's products read and write besides weights, each once."""
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = 2 * c.width + 4 * heads + 4 * kv_heads  # normalised input, q, k, v, what attention gives, output
    return attention + 2 * c.width + 4 * c.mlp_width  # input, gate, their product with up, output


def decoder_stacks(config: RunConfig):
    """The decoder stacks that a stage runs: [(StackConfig, tokens of a row in it)]."""
    held = find(config.stage)
    m, stacks = config.model, []
    if "embedding" in held.components:
        stacks.append((m.embedding.stack, BatchShape.of(config.data, m.embedding, image_id=0).long_length))
    if "llm" in held.components and "llm" not in held.partial:
        stacks.append((m.llm.stack, config.data.sequence_length))
    return stacks
