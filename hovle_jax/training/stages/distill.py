"""Stage 1 of HoVLE: the embedding learns to see from a frozen teacher, and passes text through (paper, section 3.2)."""

import jax
import jax.numpy as jnp

from hovle_jax.components import Models
from hovle_jax.config import RunConfig
from hovle_jax.data.kinds import RANDOM_TEXT
from hovle_jax.model import flops
from hovle_jax.model.flops import Work
from hovle_jax.training.flops import TRAINED, UNTOUCHED, Part, embedding_parts
from hovle_jax.training.losses.tokens import cosine
from hovle_jax.training.stage import LLM_TABLE, Pairs, Stage


def losses(models: Models, params: dict, batch: dict) -> Pairs:
    """-cos(image) - cos(text), each a mean over its own positions."""
    embedding = models["embedding"].bind({"params": params["embedding"]})
    raw, _ = embedding.encode(batch)
    student = embedding.image_outputs(raw, batch)
    if "head" in params:
        student = models["head"].apply({"params": params["head"]}, student)
    table = jax.lax.stop_gradient(params["llm"]["token_embedding"]["embedding"])
    # Ids beyond the LLM's table have no weight, and "clip" keeps them from giving NaN.
    vectors = jnp.take(table, batch["tokens"], axis=0, mode="clip")
    return {
        "image": cosine(student, image_targets(models, params, batch["tiles"]), batch["image_weights"]),
        "text": cosine(embedding.shorten(raw, batch), vectors, batch["text_weights"]),
    }


def image_targets(models: Models, params: dict, tiles: jax.Array) -> jax.Array:
    """[B, M, S, S, 3] -> the teacher's features [B, M * tokens per tile, width of the target]."""
    B, M = tiles.shape[:2]
    features = models["teacher"].apply(
        {"params": params["teacher"]},
        tiles.reshape(B * M, *tiles.shape[2:]),
        models.config.embedding.tokens_per_tile,
    )
    return jax.lax.stop_gradient(features).reshape(B, -1, features.shape[-1])


def parts(config: RunConfig, rows: int) -> list[Part]:
    """The embedding, the teacher, and the head that some teachers need."""
    assert config.teacher is not None
    tiles, tokens = config.data.tiles * rows, config.model.embedding.tokens_per_tile
    made = embedding_parts(config, rows) + [Part("teacher", flops.teacher(config.teacher, tokens) * tiles, UNTOUCHED)]
    if config.teacher.projector == "linear":
        width, target = config.model.embedding.stack.width, 4 * config.teacher.width
        made.append(Part("projection", Work(dense=flops.product(tiles * tokens, width, target)), TRAINED))
    return made


STAGE = Stage(
    components=("embedding", "head", "teacher", "llm"),
    trained=(("embedding",), ("head",)),
    held=(LLM_TABLE,),
    batch=RANDOM_TEXT,
    losses=losses,
    loss_weights={"image": "image_weights", "text": "text_weights"},
    flops=parts,
    metrics=lambda means: {f"{name}_cosine": -mean for name, mean in means.items()},
    benchmark=None,
    has_held_out=True,
)
