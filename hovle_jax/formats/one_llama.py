"""A base HoVLE as one Llama: the embedding's layers, then the LLM's, over the embedding's text table.

Both stacks are causal layers of one kind over one running position, and nothing stands between them: no final norm of
the embedding, no second sequence. So text needs no code of HoVLE's. What makes input vectors of image tiles (patches,
positions, pixel shuffle projection) is apart: `vision_rules`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from hovle_jax.errors import UserError
from hovle_jax.formats import gguf, hovle, internlm2, llama
from hovle_jax.formats.mapping import SAME, Rule, Transform, nested, padded, rule
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig, LLMConfig, RopeScaling, StackConfig
from hovle_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD, resize_positions

# Of both stacks; each has layers of its own number, and `_rope` compares the scaling of positions.
SHARED = (
    "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "rope_theta", "norm_eps", "qkv_bias", "output_bias",
    "mlp_bias", "qk_norm",
)  # fmt: skip


def llm_config(config: HoVLEConfig) -> LLMConfig:
    """The one decoder that a HoVLE is.

    Raises:
      UserError: it is not one; says what is in the way.
    """
    embedding, llm = config.embedding, config.llm
    if embedding is None:
        raise UserError("an LLM alone has its own public format: export it without --as")
    _check_between(embedding, llm)
    for name in SHARED:
        first, second = getattr(embedding.stack, name), getattr(llm.stack, name)
        if first != second:
            raise UserError(
                f"{_NOT} the layers of a Llama are alike, and here the embedding has {name}={first}, the LLM {second}"
            )
    _check_layers(llm.stack)
    scaling, longest = _rope(embedding, llm)
    layers = embedding.stack.num_layers + llm.stack.num_layers
    stack = dataclasses.replace(llm.stack, num_layers=layers, rope_scaling=scaling)
    return LLMConfig(stack, llm.vocab_size, longest, family="llama")


_NOT = "this model is not one Llama:"


def _check_between(embedding, llm):
    """Raises UserError where something stands between the text table, the two stacks and the head."""
    if embedding.pixel_shuffle == "post":
        raise UserError(
            f"{_NOT} HoVLE-HD shuffles the visual tokens between the embedding and the LLM (pixel_shuffle='post'), so "
            "that the two read sequences of different lengths; export it without --as"
        )
    if embedding.normalize_output:
        raise UserError(
            f"{_NOT} the embedding's output is L2-normalised before the LLM reads it; a model that is trained with "
            "--config.model.embedding.normalize_output=False can be exported"
        )
    if embedding.num_special_tokens:
        raise UserError(
            f"{_NOT} the embedding has a second table of {embedding.num_special_tokens} special tokens "
            "(num_special_tokens), and a Llama has one table"
        )
    if embedding.vocab_size != llm.vocab_size:
        raise UserError(
            f"{_NOT} the embedding reads {embedding.vocab_size:,} ids and the LLM writes {llm.vocab_size:,}, and a "
            "Llama's table and head have the same ids"
        )


def _check_layers(stack):
    """Raises UserError where a layer has what a Llama's has not."""
    if stack.qk_norm:
        raise UserError(f"{_NOT} its layers norm queries and keys (qk_norm, as Qwen3's), and a Llama's do not")
    if stack.qkv_bias != stack.output_bias:
        raise UserError(
            f"{_NOT} a Llama has biases in all projections of its attention or in none, and here "
            f"qkv_bias={stack.qkv_bias}, output_bias={stack.output_bias}"
        )
    if stack.width % stack.num_heads:
        raise UserError(
            f"{_NOT} transformers loads a Llama whose width is a multiple of its heads, and here width={stack.width}, "
            f"num_heads={stack.num_heads}"
        )


def _rope(embedding: EmbeddingConfig, llm: LLMConfig) -> tuple[RopeScaling | None, int]:
    """-> (the scaling of both stacks, the longest text).

    Dynamic NTK does nothing up to its original length. Where one stack alone has it, as in the published HoVLE, the
    Llama has none and stays within that length.
    """
    pair = embedding.stack.rope_scaling, llm.stack.rope_scaling
    if pair[0] == pair[1]:
        return pair[0], llm.max_length
    fixed = [None if scaling is not None and scaling.kind == "dynamic" else scaling for scaling in pair]
    if fixed[0] != fixed[1]:
        raise UserError(
            f"{_NOT} the embedding's positions are scaled otherwise (rope_scaling={pair[0]}) than the LLM's ({pair[1]})"
        )
    bounds = [scaling.original_length for scaling in pair if scaling is not None and scaling.kind == "dynamic"]
    return fixed[0], min(llm.max_length, *bounds)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a format calls the parts of a Llama.

    Attributes:
      table, norm, head: tensors.
      layers: the rules of a stack's layers.
    """

    table: str
    norm: str
    head: str
    layers: Callable[[StackConfig], list[Rule]]


TRANSFORMERS = Names(
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    lambda stack: llama.stack_rules(stack, "model.layers."),
)
GGUF = Names(gguf.TABLE, gguf.NORM, gguf.HEAD, lambda stack: gguf.stack_rules(stack, "llama"))


def rules(config: HoVLEConfig, names: Names = TRANSFORMERS) -> list[Rule]:
    """The rules of the Llama over {'embedding', 'llm'}. Without a head of its own (tied), the LLM's table is the head.

    What a HoVLE stores and does not use, the LLM's table beside a head, has no rule.
    """
    embedding, llm = config.embedding, config.llm
    assert embedding is not None
    below = nested(names.layers(embedding.stack), ours="embedding/stack")
    above = nested(names.layers(llm.stack), ours="llm/stack")
    head = internlm2.head_rules(dataclasses.replace(llm, head_stored=True), names.head)
    rows = embedding.vocab_size, embedding.table_rows
    return [
        rule(names.table, "embedding/text_embedding/embedding", padded(SAME, *rows)),
        *below,
        *(dataclasses.replace(r, first_layer=embedding.stack.num_layers) for r in above),
        rule(names.norm, "llm/norm/scale", SAME),
        *nested(head, ours="llm"),
    ]


def vision_rules(config: EmbeddingConfig) -> list[Rule]:
    """The rules of what makes input vectors of tiles, in PyTorch's shapes, over {'embedding'}.

    position_embedding [P, D] is for tiles of `tile_size`: resized where the learned positions are of another grid, so
    these rules only write.
    """
    kept = ("patch_embedding/", "pixel_shuffle_projection/")
    taken = [r for r in hovle.embedding_rules(config) if r.ours[0].startswith(kept)]
    named = [dataclasses.replace(r, public=r.public.removeprefix("vision_embeddings.")) for r in taken]
    positions = Transform(_not_read, lambda table: resize_positions(jnp.asarray(table), config.grid))
    return nested([*named, rule("position_embedding", "position_embedding", positions)], ours="embedding")


def _not_read(_):
    raise NotImplementedError("resized positions are written, not read")


def vision_to_json(config: EmbeddingConfig, image_id: int | None) -> dict[str, Any]:
    """What code that makes input vectors of tiles must know.

    Args:
      image_id: the id whose places in a prompt the visual tokens take; None = unknown.
    """
    return {
        "tile_size": config.tile_size,
        "patch_size": config.patch_size,
        "tokens_per_tile": config.tokens_per_tile,
        "image_token_id": image_id,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
