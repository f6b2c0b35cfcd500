"""THE table: what each stage holds, trains and minimises.

A stage is a predicate over parameter paths and a function from (models, parameters, batch) to (sum, weight) pairs.
Parameters are a dict of components: 'embedding', 'llm', 'clip', 'teacher', 'head'.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from hovle_jax.config import ModelConfig, RunConfig
from hovle_jax.data.kinds import CAPTIONS, CONVERSATIONS, RANDOM_TEXT, TEXT
from hovle_jax.model.clip import CLIP, MAX_LOG_SCALE
from hovle_jax.model.config import ExecutionConfig, HoVLEConfig
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.teacher import VisionTeacher
from hovle_jax.model.transformer import dense
from hovle_jax.training.losses import chunked_cross_entropy, contrastive, cosine, cross_entropy

# Stored because the public checkpoints have them, used by nothing: never trained, decayed or changed.
UNUSED = (("embedding", "class_embedding"), ("embedding", "class_position"))
LLM_TABLE = ("llm", "token_embedding")  # behind an embedding it is not used either, unless it is the head too (tied)


class Head(nn.Module):
    """Brings the student's width to that of a 'linear' teacher; dropped after distillation."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        return dense(self.width, ("embed", "embed_out"), "projection", self.dtype)(x)


@dataclasses.dataclass(frozen=True)
class Models:
    """Every module that a run or a model describes; building one costs nothing until it is initialised."""

    config: RunConfig | ModelConfig
    execution: ExecutionConfig

    @property
    def hovle(self):
        return HoVLE(self.config.model, self.execution)

    @property
    def clip(self):
        return CLIP(self.config.clip, self.execution)

    @property
    def teacher(self):
        return VisionTeacher(self.config.teacher, self.execution)

    @property
    def head(self):
        return Head(4 * self.config.teacher.vision.width, self.execution.dtype)

    def init(self, component, key, batch):
        """Fresh boxed parameters of one component, from a batch (or its shapes)."""
        if component == "llm":
            return self.hovle.llm.init(key, batch["tokens"], batch["positions"], batch["segment_ids"])["params"]
        if component == "embedding":
            return self.hovle.embedding.init(key, batch)["params"]
        if component == "clip":
            return self.clip.init(key, batch["tiles"][:, 0], batch["tokens"])["params"]
        if component == "teacher":
            # The count is a static shape, so it must not become a tracer; no parameter depends on it.
            return self.teacher.init(key, batch["tiles"][:, 0], (self.config.teacher.vision.grid // 2) ** 2)["params"]
        width = self.config.model.embedding.stack.width
        return self.head.init(key, jnp.zeros((1, 1, width)))["params"]


def token_losses(models, params, hidden, batch):
    """Cross-entropy of the tokens that follow, from hidden states before the final norm."""
    chunk = models.execution.vocab_chunk
    if not chunk:
        logits = models.hovle.hidden_to_logits(params, hidden)
        return {"loss": cross_entropy(logits, batch["targets"], batch["loss_weights"])}
    x = models.hovle.llm.apply({"params": params["llm"]}, hidden, method="normalize")
    kernel, vocab_size = models.hovle.head_kernel(params).astype(x.dtype), models.config.model.llm.vocab_size
    return {"loss": chunked_cross_entropy(x, kernel, batch["targets"], batch["loss_weights"], vocab_size, chunk)}


def pretrain_losses(models, params, batch):
    llm = models.hovle.llm.bind({"params": params["llm"]})
    hidden, _ = llm.run(llm.token_embedding(batch["tokens"]), batch["positions"], batch["segment_ids"])
    return token_losses(models, params, hidden, batch)


def contrast_losses(models, params, batch):
    images, texts, log_scale = models.clip.apply({"params": params["clip"]}, batch["tiles"][:, 0], batch["tokens"])
    return {"loss": contrastive(images, texts, log_scale)}


def distill_losses(models, params, batch):
    """-cos(image) - cos(text), each a mean over its own positions."""
    config = models.config
    embedding = models.hovle.embedding.bind({"params": params["embedding"]})
    raw, _ = embedding.encode(batch)
    tiles = batch["tiles"]
    B, M = tiles.shape[:2]
    teacher = models.teacher.apply(
        {"params": params["teacher"]}, tiles.reshape(B * M, *tiles.shape[2:]), config.model.embedding.tokens_per_tile
    )
    teacher = jax.lax.stop_gradient(teacher).reshape(B, -1, teacher.shape[-1])
    student = embedding.image_outputs(raw, batch)
    if config.teacher.projector == "linear":
        student = models.head.apply({"params": params["head"]}, student)
    table = jax.lax.stop_gradient(params["llm"]["token_embedding"]["embedding"])
    # Ids beyond the LLM's table have no weight, and "clip" keeps them from giving NaN.
    vectors = jnp.take(table, batch["tokens"], axis=0, mode="clip")
    return {
        "image": cosine(student, teacher, batch["image_weights"]),
        "text": cosine(embedding.shorten(raw, batch), vectors, batch["text_weights"]),
    }


def answer_losses(models, params, batch):
    return token_losses(models, params, models.hovle.hidden(params, batch)[0], batch)


def clamp_scale(trained):
    """CLIP: the logit scale never exceeds 100."""
    clip = trained["clip"]
    return trained | {"clip": clip | {"log_scale": jnp.minimum(clip["log_scale"], MAX_LOG_SCALE)}}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
      components: those that the stage holds.
      trained: path prefixes that are differentiated and have optimizer state, less those that nothing uses.
      losses: (models, params, batch) -> {name: (sum, weight)}; their quotients are added up.
      weights: {name of a loss: field of the batch whose sum is its weight}; without them a batch cannot be read in
        parts, as a contrastive one.
      passed: components that are not trained and that gradients pass through on their way to others.
      exists: path prefixes that exist at all, for components held in part.
      after_update: applied to the trained parameters behind each step.
    """

    components: tuple[str, ...]
    trained: tuple[tuple[str, ...], ...]
    losses: Callable
    weights: dict = dataclasses.field(default_factory=dict)
    passed: tuple[str, ...] = ()
    exists: tuple[tuple[str, ...], ...] = ()
    after_update: Callable = lambda trained: trained

    def holds(self, path):
        """Whether a parameter exists in this stage: `distill` has the LLM's token table and nothing else of it."""
        partial = [prefix for prefix in self.exists if prefix[0] == path[0]]
        return path[0] in self.components and (not partial or _under(path, partial))

    def trains(self, path, model: HoVLEConfig):
        return _under(path, self.trained) and not self.is_unused(path, model)

    def is_unused(self, path, model: HoVLEConfig):
        """Whether the stage holds a parameter that its losses do not read."""
        has_unused_table = "embedding" in self.components and not self.exists and not model.llm.tied
        return _under(path, UNUSED + (LLM_TABLE,) * has_unused_table)


def _under(path, prefixes):
    return any(tuple(path[: len(prefix)]) == prefix for prefix in prefixes)


TOKENS = {"loss": "loss_weights"}

BATCH_KINDS = {
    "pretrain": TEXT, "contrast": CAPTIONS, "distill": RANDOM_TEXT, "align": CONVERSATIONS, "instruct": CONVERSATIONS,
}  # fmt: skip

STAGES = {
    "pretrain": Stage(("llm",), (("llm",),), pretrain_losses, TOKENS),
    "contrast": Stage(("clip",), (("clip",),), contrast_losses, after_update=clamp_scale),
    "distill": Stage(
        ("embedding", "head", "teacher", "llm"),
        (("embedding",), ("head",)),
        distill_losses,
        {"image": "image_weights", "text": "text_weights"},
        exists=(LLM_TABLE,),
    ),
    "align": Stage(("embedding", "llm"), (("embedding",),), answer_losses, TOKENS, passed=("llm",)),
    "instruct": Stage(("embedding", "llm"), (("embedding",), ("llm",)), answer_losses, TOKENS),
}


def components_of(config: RunConfig):
    """The components of a run's stage; a student needs no head for a teacher that has a projector."""
    components = STAGES[config.stage].components
    if "head" in components and config.teacher.projector != "linear":
        components = tuple(c for c in components if c != "head")
    return components
