"""What the compiled train step does on a mesh: a sharding constraint that is silently lost must be seen here.

The numbers of a run would stay the same without its constraints; its memory and its traffic would not. Rows of the
batch come in sevens, which no parameter has, so that the sizes of arrays tell activations from parameters.
"""

import collections
import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from hovle_jax.aot.hlo.collectives import collectives
from hovle_jax.aot.hlo.text import parse
from hovle_jax.config import MeshConfig
from hovle_jax.model import embedding
from hovle_jax.model.execution import OneDevice
from hovle_jax.sharding.layout import Layout
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training import setup
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import make_state
from hovle_jax.training.step import train_step
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 56
FLOAT_BYTES = 4
FLOAT_ARRAY = re.compile(r"\bf32\[([\d,]+)\]")
FSDP, BOTH = MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=4)


class Step:
    """The compiled step of a micro run over a mesh of eight devices, and what it may not do.

    Args:
      broken: takes the run's set-up and gives what it is traced with.
      context: under which it is traced.
    """

    def __init__(self, variant, mesh_config, broken=lambda run: run, context=contextlib.nullcontext):
        self.config = micro.run_config("instruct", variant, data=dict(batch_size=ROWS))
        self.mesh, self.batch = make_mesh(mesh_config), micro.dataset(self.config)[0]
        run = micro.run(self.config, self.mesh)
        self.state = make_state(STAGES["instruct"], run, micro.params(self.config, self.mesh))
        with context():
            rows = run.placement.put_batch(self.batch)
            self.compiled = train_step.lower(self.state, rows, stage="instruct", run=broken(run)).compile()
        self.text = self.compiled.as_text()
        self.collectives = collectives(self.text)
        flat = flatten_dict(self.state.trained)
        # (elements of a layer's kernel, layers): the embedding's and the LLM's layers are scanned.
        self.kernels = [
            (math.prod(leaf.shape[-2:]), leaf.shape[0] if leaf.ndim == 3 else 1)
            for path, leaf in flat.items()
            if path[-1] == "kernel"
        ]
        self.vectors = [leaf for path, leaf in flat.items() if path[-1] not in ("kernel", "embedding")]
        self.tables = [leaf for path, leaf in flat.items() if path[-1] == "embedding"]

    def floats(self, kind):
        """[(elements that a device puts in, the collective)] of those of a kind that carry floats."""
        chosen = [c for c in self.collectives if c.kind == kind and c.dtype in ("f32", "u32")]
        return [(c.operand_bytes // FLOAT_BYTES, c) for c in chosen]

    def faults(self):
        """Names of what is wrong."""
        checks = (
            self.moved_state,
            self.gradients_not_scattered,
            self.gradients_summed_whole,
            self.gathered_activations,
            self.exchanged_activations,
            self.activations_of_all_rows,
        )
        return {check.__name__ for check in checks if check()}

    def moved_state(self):
        """The new state lies elsewhere than the old one."""
        outputs = jax.tree.leaves(self.compiled.output_shardings[0])
        pairs = zip(outputs, jax.tree.leaves(self.state), strict=True)
        return not all(found.is_equivalent_to(leaf.sharding, leaf.ndim) for found, leaf in pairs)

    def gradients_not_scattered(self):
        """Not exactly one reduce-scatter for each kernel and layer, or not of a layer's whole gradient."""
        found = collections.Counter()
        for elements, c in self.floats("reduce-scatter"):
            found[elements] += c.times
        wanted = collections.Counter()
        for elements, layers in self.kernels:
            wanted[elements] += layers
        return found != wanted

    def gradients_summed_whole(self):
        """More is summed over `fsdp` than gradients of vectors and tables, and a few scalars for each parameter.

        Whether a table's gradient is exchanged by its part of the width or summed whole is the compiler's choice.
        """
        summed = sum(n * c.times for n, c in self.floats("all-reduce") if c.group_size > self.mesh.shape["data"])
        allowed = sum(leaf.size for leaf in self.vectors + self.tables)
        return summed > allowed + 3 * len(jax.tree.leaves(self.state.trained))

    def gathered_activations(self):
        """Something is gathered that is no shard of a parameter."""
        parts = self.mesh.shape["fsdp"]
        shards = {elements // parts for elements, _ in self.kernels} | {leaf.size // parts for leaf in self.vectors}
        gathered = {elements for elements, _ in self.floats("all-gather")}
        return not (gathered <= shards and gathered >= {elements // parts for elements, _ in self.kernels})

    def exchanged_activations(self):
        """More is exchanged than a table's rows, looked up by their part of the width, and their gradient."""
        sent = sum(elements * c.times for elements, c in self.floats("all-to-all"))
        lookups = 2 * len(self.tables)
        return sent > lookups * self.lookup_elements()

    def lookup_elements(self):
        """A device's rows with all of the width, or all rows with its part of it."""
        length = max(self.batch[name].shape[1] for name in self.batch if name.endswith("tokens"))
        return ROWS // 8 * length * self.config.model.llm.stack.width

    def activations_of_all_rows(self):
        """A device holds an array of all rows, and of more than its part of the width."""
        for computation in parse(self.text).computations.values():
            for x in computation.instructions.values():
                for shape in FLOAT_ARRAY.findall(x.shape):
                    sizes = [int(n) for n in shape.split(",")]
                    if ROWS in sizes and math.prod(sizes) > self.lookup_elements():
                        return True
        return False


@pytest.mark.parametrize("variant, mesh_config", [("pre", FSDP), ("post", BOTH)])
def test_a_step_moves_shards_of_parameters_and_leaves_rows_where_they_are(variant, mesh_config):
    assert Step(variant, mesh_config).faults() == set()


@dataclasses.dataclass(frozen=True)
class WithoutRule(Placement):
    """A placement with a row of the table mapped to nothing, for one use or all."""

    name: str = ""
    of: str = ""

    def rules(self, use="parameters"):
        table = super().rules(use)
        return table | {self.name: None} if self.of in ("", use) else table


def without_rule(name, of=""):
    def broken(run):
        placement = WithoutRule(run.placement.mesh, name=name, of=of)
        boxed = {c: setup.logical_shapes(run.models.config, c) for c in ("embedding", "llm")}
        models = dataclasses.replace(run.models, placement=placement)
        return dataclasses.replace(run, models=models, layout=Layout.of(placement, boxed))

    return broken


def without_placement(run):
    """Modules that know nothing of the mesh."""
    return dataclasses.replace(run, models=dataclasses.replace(run.models, placement=OneDevice()))


@contextlib.contextmanager
def scatter_of_all_rows():
    """Rows as one more index of the scatter, from which the compiler cannot tell that each stays where it is."""

    def scatter(sequence, values, positions):
        rows = jnp.arange(len(sequence))[:, None]
        return sequence.at[rows, positions].set(values, mode="drop")

    jax.clear_caches()  # what was traced before is not traced again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "scatter_rows", scatter)
        yield
    jax.clear_caches()


BROKEN = {
    "no constraint on rows": (dict(broken=without_rule("batch")), "activations_of_all_rows"),
    "gradients not sharded": (dict(broken=without_rule("embed", "gradients")), "gradients_summed_whole"),
    "modules without a mesh": (dict(broken=without_placement), "gradients_not_scattered"),
    "rows scattered together": (dict(context=scatter_of_all_rows), "gathered_activations"),
}


OFTEN = ("no constraint on rows", "modules without a mesh")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in OFTEN)) for n in BROKEN])
def test_a_lost_constraint_is_seen(name):
    how, fault = BROKEN[name]
    assert fault in Step("pre", FSDP, **how).faults()
