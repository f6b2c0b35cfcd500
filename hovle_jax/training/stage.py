"""What a stage of training is: one row of the table in `training/stages`."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from hovle_jax.components import COMPONENTS, Models, Params, adapter_targets
from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.data.kinds import Kind
from hovle_jax.errors import UserError
from hovle_jax.model.adapters import COMPONENT as ADAPTER
from hovle_jax.model.adapters import KERNEL
from hovle_jax.sharding.layout import Path
from hovle_jax.training.flops import Part, StepFlops, adapted, step_flops

LLM_TABLE = ("llm", "token_embedding")  # under an embedding nothing reads it, unless it is the head too (tied)

# Sums and weights of the terms of a loss: {name: (sum, weight)}.
Pairs = dict[str, tuple]


def term_losses(means: dict) -> dict:
    """What is shown beside the whole loss: {'NAME_loss': mean} of each term but one that is called 'loss' itself."""
    return {f"{name}_loss": mean for name, mean in means.items() if name != "loss"}


@dataclasses.dataclass(frozen=True)
class Compared:
    """The losses of a stage that compares all rows of a batch with each other, in two halves.

    A batch that is read in microbatches is encoded part by part, and compared whole.

    Attributes:
      encode: (models, params, batch) -> a tree of arrays [B, ...], what is compared of each row.
      compare: (models, params, that tree) -> Pairs.
    """

    encode: Callable[[Models, Params, dict], Any]
    compare: Callable[[Models, Params, Any], Pairs]

    def __call__(self, models: Models, params: Params, batch: dict) -> Pairs:
        return self.compare(models, params, self.encode(models, params, batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One row: everything that the rest of the project asks of a stage.

    Attributes:
      components: those that it holds, of `COMPONENTS`.
      trained: path prefixes that are differentiated and have optimizer state, less those that nothing uses.
      through: components that are not trained and that gradients pass through on their way to others.
      held: path prefixes of components that it holds in part; of the others it holds everything.
      batch: the kind of its batches.
      losses: (models, params, batch) -> Pairs; their quotients are added up. `Compared`, if rows are with each other.
      loss_weights: {name of a loss: field of the batch whose sum is its weight}; empty for `Compared` losses.
      flops: (config, rows) -> the parts of a step's FLOPs.
      benchmark: the benchmark that scores its result (evaluation/benchmarks.py); None: held-out losses alone.
      has_held_out: whether a corpus' own test split gives held-out losses; later stages have benchmarks.
      metrics: the means of the loss's terms -> what is shown beside the whole loss.
      after_update: applied to the trained parameters after each step.
      draw: (models, batch, key of the step) -> the batch with what training draws for its rows on the device; None =
        nothing.
      finish: (models, params, batches on the devices) -> params with what is gathered when all is trained; None = that
        is all of it.
      frozen: sizes -> path prefixes, of what it trains, that a run leaves as they are.
    """

    components: tuple[str, ...]
    trained: tuple[Path, ...]
    through: tuple[str, ...] = ()
    held: tuple[Path, ...] = ()
    batch: Kind
    losses: Callable[[Models, Params, dict], Pairs]
    loss_weights: dict[str, str]
    flops: Callable[[RunConfig, int], list[Part]]
    benchmark: str | None
    has_held_out: bool
    metrics: Callable[[dict], dict] = term_losses
    after_update: Callable[[Params], Params] = lambda trained: trained
    draw: Callable[[Models, dict, jax.Array], dict] | None = None
    finish: Callable[[Models, Params, Iterable[dict]], Params] | None = None
    frozen: Callable[[ModelConfig], tuple[Path, ...]] = lambda config: ()

    def components_of(self, config: ModelConfig) -> tuple[str, ...]:
        """The components that a run with these sizes has."""
        return tuple(c for c in (*self.components, ADAPTER) if COMPONENTS[c].has_sizes(config))

    @property
    def compared(self) -> Compared | None:
        """Its losses in two halves, where they compare rows with each other."""
        return self.losses if isinstance(self.losses, Compared) else None

    @property
    def partial(self) -> set[str]:
        """Components that it holds in part: `distill` has the LLM's token table and nothing else of it."""
        return {prefix[0] for prefix in self.held}

    @property
    def result(self) -> tuple[str, ...]:
        """The components that it hands on."""
        return tuple(c for c in self.components if COMPONENTS[c].handed_on and c not in self.partial)

    def holds(self, path: Path) -> bool:
        """Whether a parameter exists in this stage."""
        if path[0] == ADAPTER:
            return True
        return path[0] in self.components and (path[0] not in self.partial or _under(path, self.held))

    def trains(self, path: Path, config: ModelConfig) -> bool:
        """Whether a parameter is differentiated and updated: where there are adapters, these alone."""
        if config.adapter.rank:
            return path[0] == ADAPTER
        return _under(path, self.trained) and not _under(path, self.frozen(config)) and not self.is_unused(path, config)

    def check_adapters(self, config: ModelConfig) -> None:
        """Raises UserError where adapters are asked for and the stage has no kernels for them."""
        config.adapter.check()
        if not config.adapter.rank:
            return
        targets, asked = adapter_targets(config), f"adapter.targets={config.adapter.targets!r}"
        trained = ", ".join(f"{prefix[0]}/*" for prefix in self.trained)
        if not targets:
            raise UserError(f"{asked} matches no kernel; use patterns as {trained}")
        if absent := [target.name for target in targets if not self.holds((*target.path, KERNEL))]:
            raise UserError(f"{asked} matches {absent[0]}, which this stage does not hold; use patterns as {trained}")

    def step_flops(self, config: RunConfig, rows: int | None = None, **how) -> StepFlops:
        """The FLOPs of one optimizer step, of which `rows` (None: the config's) are all rows of the global batch.

        Args:
          how: see `flops.step_flops`.
        """
        parts = self.flops(config, config.data.batch_size if rows is None else rows)
        if config.adapter.rank:
            parts = adapted(parts, {target.path[:2] for target in adapter_targets(config.model_config)})
        return step_flops(config, parts, **how)

    def is_unused(self, path: Path, config: ModelConfig) -> bool:
        """Whether the stage holds a parameter that its losses do not read, or that is none but a statistic."""
        component = COMPONENTS[path[0]]
        if _under(path[1:], component.unused) or path[-1] in component.statistics:
            return True
        return "embedding" in self.components and not self.held and not config.llm.tied and _under(path, (LLM_TABLE,))


def _under(path, prefixes):
    return any(tuple(path[: len(prefix)]) == prefix for prefix in prefixes)
