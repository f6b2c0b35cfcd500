"""FLOPs of a training step, from the config alone.

Model FLOPs are what a step needs: the forward pass; for what is trained two more times its products (the gradient of
the inputs and of the weights; one more for products that read pixels); for a frozen component that gradients pass
through the gradient of its inputs alone; for one that they do not reach nothing. Attention, between activations, costs
twice its forward pass in both of the first cases.

Hardware FLOPs are what is computed: rematerialised layers again (but for the product that ends each), attention as its
implementation does it, and the logits again where they are not kept. MFU divides the first by time and peak.
"""

import dataclasses

from hovle_jax.config import RunConfig
from hovle_jax.data.batch import BatchShape
from hovle_jax.model import flops
from hovle_jax.model.flops import Work

# How gradients treat a part of a step.
TRAINED, THROUGH, UNTOUCHED = "trained", "through", "untouched"


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the global batch, all devices together.

    Attributes:
      model, hardware: see above.
      parts: {name: model FLOPs}.
    """

    model: float
    hardware: float
    parts: dict


@dataclasses.dataclass(frozen=True)
class Attention:
    """What an implementation of attention computes.

    Attributes:
      skips_masked: only pairs of tokens that see each other (nearly: it skips whole blocks).
      backward_products: of the L x L x C kind; the forward pass has two.
    """

    skips_masked: bool
    backward_products: int


ATTENTION = {
    "xla": Attention(False, 4),
    # One fused kernel: scores and the gradient of the probabilities anew, then what queries, keys and values get.
    "splash": Attention(True, 5),
    "cudnn": Attention(True, 5),
}


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a step: `repeated` is what a full rematerialisation covers, `again` times a product is made anew."""

    name: str
    work: Work
    gradient: str
    layers: bool = False
    again: int = 0

    def model(self):
        return self.work.forward + self._backward(self.work.attention * 2)

    def hardware(self, attention: Attention, remat):
        w = self.work
        pairs = w.attention if attention.skips_masked else w.square
        backward = self._backward(pairs * attention.backward_products / 2)
        forward = w.dense + w.first + pairs
        if self.gradient == UNTOUCHED:
            return forward
        repeated = {"none": 0, "dots": pairs}.get(remat, w.dense - w.last + pairs) if self.layers else 0
        return forward + backward + repeated + self.again * w.dense

    def _backward(self, attention):
        if self.gradient == UNTOUCHED:
            return 0
        return attention + (2 * self.work.dense + self.work.first if self.gradient == TRAINED else self.work.dense)


def step_flops(config: RunConfig, rows=None, attention="xla", logits_kept=True):
    """The FLOPs of one optimizer step.

    Args:
      rows: of the global batch, over all microbatches; None = the config's.
      attention: of `ATTENTION`: how the decoder stacks do it ("xla" for the towers).
      logits_kept: whether the loss keeps the logits for its backward pass; else their product is made twice.
    """
    rows = config.data.batch_size if rows is None else rows
    parts = _PARTS[config.stage](config, rows)
    if not logits_kept:
        parts = [dataclasses.replace(part, again=1) if part.name == "head" else part for part in parts]
    of = lambda part: ATTENTION[attention if part.name in ("embedding layers", "llm layers") else "xla"]
    return StepFlops(
        model=sum(part.model() for part in parts),
        hardware=sum(part.hardware(of(part), config.execution.remat) for part in parts),
        parts={part.name: part.model() for part in parts},
    )


def _llm(config, rows, gradient):
    c, length = config.model.llm, config.data.sequence_length
    return [
        _Part("llm layers", flops.decoder_stack(c.stack, length) * rows, gradient, layers=True),
        _Part("head", flops.llm_head(c, length) * rows, gradient),
    ]


def _embedding(config, rows):
    c, data = config.model.embedding, config.data
    length = BatchShape.of(data, c, image_id=0).long_length
    return [
        _Part("embedding layers", flops.decoder_stack(c.stack, length) * rows, TRAINED, layers=True),
        _Part("embedding ends", flops.embedding_ends(c, data.tiles) * rows, TRAINED),
    ]


def _pretrain(config, rows):
    return _llm(config, rows, TRAINED)


def _align(config, rows):
    return _embedding(config, rows) + _llm(config, rows, THROUGH)


def _instruct(config, rows):
    return _embedding(config, rows) + _llm(config, rows, TRAINED)


def _distill(config, rows):
    tiles, tokens = config.data.tiles * rows, config.model.embedding.tokens_per_tile
    parts = _embedding(config, rows) + [_Part("teacher", flops.teacher(config.teacher, tokens) * tiles, UNTOUCHED)]
    if config.teacher.projector == "linear":
        width, target = config.model.embedding.stack.width, 4 * config.teacher.vision.width
        parts.append(_Part("projection", Work(dense=flops.product(tiles * tokens, width, target)), TRAINED))
    return parts


def _contrast(config, rows):
    c = config.clip
    v, t = c.vision, c.text
    vision = flops.encoder_stack(v, v.num_layers, v.grid**2 + 1)
    return [
        _Part("vision layers", vision * rows, TRAINED, layers=True),
        _Part("vision ends", flops.clip_vision_ends(c) * rows, TRAINED),
        _Part("text layers", flops.encoder_stack(t, t.num_layers, t.context, causal=True) * rows, TRAINED, layers=True),
        _Part("text ends", flops.clip_text_ends(c) * rows, TRAINED),
        _Part("similarities", Work(dense=flops.product(rows, c.projection_width, rows)), TRAINED),
    ]


_PARTS = {
    "pretrain": _pretrain, "contrast": _contrast, "distill": _distill, "align": _align, "instruct": _instruct,
}  # fmt: skip
