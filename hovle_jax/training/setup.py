"""What a run's step is compiled for: made once, from the config and the mesh, for training, benchmarks and `aot`."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from hovle_jax.components import Models, Params, logical_shapes, select
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware.compiler_options import compiler_options
from hovle_jax.sharding.layout import Layout
from hovle_jax.sharding.placement import Placement
from hovle_jax.sharding.rules import DATA, TENSOR
from hovle_jax.training.judging import Rules
from hovle_jax.training.optimizer import make_optimizer
from hovle_jax.training.stages import find


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything static of a step but its stage. Hashable.

    Attributes:
      layout: where every parameter that the stage holds lies.
      accumulate: microbatches that a step reads its batch in.
      rules: which updates it leaves out.
      seed: of what a step draws.
    """

    models: Models
    layout: Layout
    optimizer: optax.GradientTransformationExtraArgs
    accumulate: int = 1
    rules: Rules = Rules()
    seed: int = 0

    @property
    def placement(self) -> Placement:
        return self.layout.placement

    @property
    def sums_once(self) -> bool:
        """Whether copies of the model accumulate their gradients by themselves, and sum them once a step.

        XLA's partitioner dies of a lookup in a table whose rows `tensor` shards, where `data` is no axis of its own.
        """
        mesh = self.placement.mesh
        return self.accumulate > 1 and mesh.shape[DATA] > 1 and mesh.shape[TENSOR] == 1

    def of_a_copy(self) -> "Run":
        """The same inside a `shard_map` over the mesh axis `data`."""
        placement = dataclasses.replace(self.placement, in_copy=True)
        models = dataclasses.replace(self.models, placement=placement)
        return dataclasses.replace(self, models=models, layout=dataclasses.replace(self.layout, placement=placement))

    def abstract_params(self) -> Params:
        """Shapes with shardings of every parameter that the stage holds."""
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=self.placement.sharding(leaf.spec()))
                for path, leaf in self.layout.leaves
            }
        )

    def compiler_options(self) -> dict[str, str]:
        """Options for a `train_step` on the mesh's devices: {option: value}."""
        e, kind = self.models.config.execution, self.placement.mesh.devices.flat[0].device_kind
        return compiler_options(kind, e.sparse_cores, e.scoped_vmem)


def build(config: RunConfig, mesh: Mesh) -> Run:
    """The set-up of a run on a mesh.

    Raises:
      UserError: mesh and batch do not fit together.
    """
    stage, placement = find(config.stage), Placement(mesh, config.execution.zero)
    placement.check_batch_shape(config.data.batch_size, config.data.sequence_length)
    accumulate = accumulation(config, placement)
    execution = config.execution.resolved(mesh.devices.flat[0].platform, accumulate)
    sizes = dataclasses.replace(config.model_config, execution=execution)
    stage.check_adapters(sizes)
    boxed = {component: logical_shapes(sizes, component) for component in stage.components_of(sizes)}
    layout = Layout.of(placement, select(boxed, stage.holds))
    optimizer, rules = make_optimizer(config.optimizer, config.steps), Rules.of(config.health)
    seed = config.seed if stage.draw else 0  # else runs of any seed have one program
    return Run(Models(sizes, placement), layout, optimizer, accumulate, rules, seed)


def accumulation(config: RunConfig, placement: Placement) -> int:
    """How many microbatches a step reads its batch in. Raises UserError where it cannot be read in so many."""
    made, shards = config.execution.accumulate, placement.batch_shards
    if made == -1:
        made = max(1, config.data.batch_size // shards)
    if made < 1:
        raise UserError(f"execution.accumulate={made} is a number of microbatches; 1 reads the batch at once")
    if config.data.batch_size % (made * shards):
        raise UserError(
            f"data.batch_size={config.data.batch_size} must divide into execution.accumulate={made} microbatches for "
            f"{shards} devices (mesh data x fsdp): use {-(-config.data.batch_size // (made * shards)) * made * shards}"
        )
    return made
