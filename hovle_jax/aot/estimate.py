"""How fast a training step can be and how much memory it takes, before anything is compiled: what orders the choices of
a plan. Compiling then decides."""

import dataclasses
import math

import jax

from hovle_jax.aot.least_traffic import least_traffic
from hovle_jax.aot.programs import batch_shapes
from hovle_jax.aot.report import bounds_of
from hovle_jax.aot.roofline import Roofline, decoder_stacks, layer_elements
from hovle_jax.config import RunConfig
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import GENERATIONS
from hovle_jax.model.config import StackConfig
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training.setup import build
from hovle_jax.training.stages import find
from hovle_jax.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a step: its bounds, with the least traffic; bytes on a device and how many it has."""

    bounds: Roofline
    memory: float
    available: float

    @property
    def fits(self):
        return self.memory <= self.available


def estimate(config: RunConfig, target):
    """-> Estimate for a `target.Target`. Raises UserError where mesh and batch do not fit together."""
    run, stage = build(config, make_mesh(config.mesh, target.devices)), find(config.stage)
    mesh = run.placement.mesh
    least, per_chip = least_traffic(stage, run), GENERATIONS[target.topology.generation].devices_per_chip
    between = least.data * per_chip
    ici, dcn = (0, between) if target.slices > 1 else (between, 0)
    ici += (least.fsdp + _activation_traffic(config, mesh)) * per_chip
    return Estimate(
        bounds=bounds_of(config, run, target.topology, target.slices, ici, dcn),
        memory=_argument_bytes(config, run) + _activation_bytes(config, run),
        available=chip_of(target.topology.generation).hbm_bytes / per_chip,
    )


def _activation_traffic(config: RunConfig, mesh):
    """Bytes that a device sends over the tensor and the sequence axis in a step.

    tensor: the results of attention and of the FFN are summed in the forward pass, again where it is made again, and
    the gradients of their inputs in the backward pass. sequence: keys and values are gathered as often, and their
    gradients scattered.
    """
    rows = config.data.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    forward = 1 if config.execution.remat in ("none", "dots") else 2
    sent = 0.0
    for stack, length in decoder_stacks(config):
        layers = rows * length / sequence * 2 * stack.num_layers
        sent += layers * stack.width * 2 * (forward + 1) * 2 * (tensor - 1) / tensor
        kv = 2 * stack.num_kv_heads * stack.head_dim / tensor
        sent += layers * kv * (forward + 1) * (sequence - 1)
    return sent


def _argument_bytes(config, run):
    """Of a device: parameters, moments, the gradients that lie beside them, and the batch."""
    state = abstract_state(find(config.stage), run, run.abstract_params())
    own = lambda tree: sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    batch = batch_shapes(config, run.placement)
    return own(batch) + own(state) + own(state.trained) * (2 if run.accumulate > 1 else 1)


# Elements a token that a layer keeps for its backward pass.
_KEPT = {
    "none": layer_elements,
    "dots": lambda c: (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * c.width + 2 * c.mlp_width,
    "full": lambda c: c.width,
    "offload": lambda c: 0,
}


def _activation_bytes(config, run):
    """What the layers keep, in bf16, the work of one layer, its gathered weights, and a chunk of logits."""
    mesh = run.placement.mesh
    rows = config.data.batch_size / run.placement.batch_shards / run.accumulate
    share = mesh.shape["tensor"] * mesh.shape["sequence"]
    kept, work = 0.0, 0.0
    for stack, length in decoder_stacks(config):
        tokens = rows * length
        kept += 2 * tokens * _KEPT[config.execution.remat](stack) * stack.num_layers / share
        work = max(work, 4 * tokens * layer_elements(stack) / share + 2 * 2 * _weights(stack))
    chunk = config.execution.vocab_chunk or config.model.llm.table_rows
    head = 0 if "llm" not in find(config.stage).result else 4 * rows * config.data.sequence_length * chunk / share
    return kept + work + head


def _weights(c: StackConfig):
    return c.width * (2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim + 3 * c.mlp_width)
