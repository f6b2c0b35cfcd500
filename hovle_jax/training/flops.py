"""FLOPs of a training step, from the config alone.

Model FLOPs are what a step needs: the forward pass; for what is trained two more times its matmuls (the gradient of
the inputs and of the weights; one more for those that read pixels); for a frozen component that gradients pass
through the gradient of its inputs alone; for one that they do not reach nothing. Attention, between activations, costs
twice its forward pass in both of the first cases.

Hardware FLOPs are what is computed: rematerialised layers again (but for the matmul that ends each), attention as its
implementation does it, and the logits again where they are not kept. MFU divides the first by time and peak.
"""

import dataclasses
from collections.abc import Mapping

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import BatchShape
from hovle_jax.model import flops
from hovle_jax.model.attention import KEY, QUERY, VALUE
from hovle_jax.model.config import StackConfig
from hovle_jax.model.flops import Work
from hovle_jax.model.splash import ATTENTION
from hovle_jax.model.transformer import REMATS, kept_names

# How gradients treat a part of a step.
TRAINED, THROUGH, UNTOUCHED = "trained", "through", "untouched"


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the global batch, all devices together: see above."""

    model: float
    hardware: float
    parts: dict[str, float]  # model FLOPs by name


# Matmuls of the L x L x C kind in the backward pass of an implementation of attention; the forward pass has two.
# Kernels have five: scores and the gradient of the probabilities anew, then what queries, keys and values get. They
# skip blocks of pairs that do not see each other.
BACKWARD_MATMULS = {"xla": 4, "splash": 5, "cudnn": 5}


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    work: Work
    gradient: str  # how gradients treat it
    layers: bool = False  # whether it is rematerialised
    matmuls: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of `work.dense`, by what remat may keep
    decoder: bool = False  # whether its attention is that of the decoder stacks; towers attend in XLA's plain way
    forwards: int = 1  # how many times the forward pass is made, but for what is rematerialised

    def model(self) -> float:
        return self.work.forward + self._backward(self.work.attention * 2)

    def hardware(self, attention: str, remat: str) -> float:
        """As it is computed; attention: of the decoder stacks, a key of BACKWARD_MATMULS."""
        w, attention = self.work, attention if self.decoder else "xla"
        pairs = w.square if attention == "xla" else w.attention
        forward = (w.dense + w.first + pairs) * self.forwards
        if self.gradient == UNTOUCHED:
            return forward
        repeated = self._repeated(attention, remat, pairs) if self.layers else 0
        backward = self._backward(pairs * BACKWARD_MATMULS[attention] / 2)
        return forward + backward + repeated

    def _repeated(self, attention, remat, pairs):
        """What the backward pass makes again of the forward pass."""
        if remat in REMATS:
            return {"none": 0, "dots": pairs}.get(remat, self.work.dense - self.work.last + pairs)
        kept = {name for names in kept_names(remat) for name in names}
        again = self.work.dense - self.work.last - sum(self.matmuls.get(name, 0) for name in kept)
        # XLA's attention keeps no probabilities: their scores are made again, and their product with values is not.
        of_pairs = {"splash": 0, "xla": 1 / 2} if kept >= {QUERY, KEY, VALUE, ATTENTION} else {}
        return again + pairs * of_pairs.get(attention, 1)

    def _backward(self, attention):
        if self.gradient == UNTOUCHED:
            return 0
        return attention + (2 * self.work.dense + self.work.first if self.gradient == TRAINED else self.work.dense)


def step_flops(config: RunConfig, parts: list[Part], attention: str = "xla", logits_kept: bool = True) -> StepFlops:
    """The FLOPs of one optimizer step.

    Args:
      parts: of the stage (`Stage.flops`), over the rows of the global batch.
      attention: of `BACKWARD_MATMULS`: how the decoder stacks do it ("xla" for the towers).
      logits_kept: whether the loss keeps the logits for its backward pass; else their matmul is made twice.
    """
    again = 0 if logits_kept else sum(part.work.dense for part in parts if part.name == "head")
    return StepFlops(
        model=sum(part.model() for part in parts),
        hardware=sum(part.hardware(attention, config.execution.remat) for part in parts) + again,
        parts={part.name: part.model() for part in parts},
    )


# What a part is of, by the first word of its name: a component, or a part of one that stands by itself.
OWNERS = {"vision": ("clip", "vision"), "text": ("clip", "text"), "embedding": ("embedding",)}


def adapted(parts: list[Part], places: set[tuple[str, ...]]) -> list[Part]:
    """The parts of a step that trains adapters in their place: kernels have no gradient, and what comes before the
    first adapter has none at all. The adapters' own products, a hundredth of the rest, are left out.

    Args:
      places: the first two names of the paths of kernels that have one.
    """

    def treated(part):
        if part.gradient != TRAINED:
            return part.gradient
        owner = OWNERS.get(part.name.split()[0])
        reached = owner is None or any(place[: len(owner)] == owner for place in places)
        return THROUGH if reached else UNTOUCHED

    return [dataclasses.replace(part, gradient=treated(part)) for part in parts]


def decoder_part(name: str, c: StackConfig, length: int, rows: int, gradient: str) -> Part:
    """The layers of a decoder stack over `rows` rows."""
    matmuls = {name: flop * rows for name, flop in flops.decoder_matmuls(c, length).items()}
    work = flops.decoder_stack(c, length) * rows
    return Part(name, work, gradient, layers=True, matmuls=matmuls, decoder=True)


def llm_parts(config: RunConfig, rows: int, gradient: str) -> list[Part]:
    """The LLM's layers and head over `rows` rows."""
    c, length = config.model.llm, config.data.sequence_length
    return [
        decoder_part("llm layers", c.stack, length, rows, gradient),
        Part("head", flops.llm_head(c, length) * rows, gradient),
    ]


def embedding_parts(config: RunConfig, rows: int) -> list[Part]:
    """The holistic embedding's layers and ends over `rows` rows, trained."""
    c, data = config.model.embedding, config.data
    assert c is not None
    length = BatchShape.of(data, c, image_id=0).long_length
    return [
        decoder_part("embedding layers", c.stack, length, rows, TRAINED),
        Part("embedding ends", flops.embedding_ends(c, data.tiles) * rows, TRAINED),
    ]
