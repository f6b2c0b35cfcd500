"""HoVLE and HoVLE-HD as published: the holistic embedding and the LLM."""

import dataclasses
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats import internlm2, llms
from hovle_jax.formats.fields import count, field, flag, number, only, table
from hovle_jax.formats.internvl import TILING, patch_rules
from hovle_jax.formats.mapping import LINEAR, SAME, Rule, nested, padded, rule
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig, LLMConfig


def config_from_json(config: dict[str, Any], where: str = "config.json") -> HoVLEConfig:
    """-> HoVLEConfig. `image_size` is the tile side of the learned positions, `force_image_size` that of the tiles."""
    only(config, "ps_version", ("v2",), "v2", where)
    is_shuffled = _is_shuffled(table(config, "embedding_config", where=where), f"{where} embedding_config")
    # The public code computes the number of visual tokens in a prompt from its square. (Our early exports had 0.5
    # where nothing is shuffled.)
    only(config, "downsample_ratio", (0.5,) if is_shuffled else (1.0, 0.5), 0.5, where)
    model = HoVLEConfig(
        embedding=_embedding_from_json(
            table(config, "embedding_config", where=where),
            normalize_output=flag(config, "normalize_encoder_output", False, where),
            tile_size=count(config, "force_image_size", None, where) if config.get("force_image_size") else None,
            where=f"{where} embedding_config",
        ),
        llm=llms.config_from_json(table(config, "llm_config", where=where), f"{where} llm_config"),
    )
    model.check()
    return model


def _embedding_from_json(config, normalize_output, tile_size, where):
    """-> EmbeddingConfig. The rotary base and the variant are published nowhere else: they have no default."""
    only(config, "num_channels", (3,), 3, where)
    only(config, "use_ls", (False,), False, where)
    # Our extension: the published checkpoints have no such key, and InternLM2's layers.
    family = only(config, "layer_type", tuple(llms.MODULES), "internlm2", where)
    vocab_size, image_size = (count(config, key, where=where) for key in ("llm_vocab_size", "image_size"))
    return EmbeddingConfig(
        family=family,
        stack=_plain_stack(config, where) if family == "internlm2" else _other_stack(config, family, where),
        image_size=image_size,
        patch_size=count(config, "patch_size", where=where),
        vocab_size=vocab_size,
        pixel_shuffle=_pixel_shuffle(config, where),
        num_special_tokens=_num_special_tokens(config, vocab_size, where),
        normalize_output=normalize_output,
        force_image_size=tile_size if tile_size not in (None, image_size) else 0,
    )


def _plain_stack(config, where):
    only(config, "hidden_act", internlm2.SILU, "silu", where)
    for key in ("attention_bias", "mlp_bias"):
        only(config, key, (False,), False, where)
    theta, eps = (number(config, key, where=where) for key in ("rope_theta", "rms_norm_eps"))
    stack = internlm2.stack_from_json(config, rope_theta=theta, norm_eps=eps, where=where)
    if not config.get("rope_scaling"):
        return stack
    bound = count(config, "max_position_embeddings", where=where)
    return dataclasses.replace(stack, rope_scaling=internlm2.scaling_from_json(config, bound, where))


def _other_stack(config, family, where):
    for key in ("rope_theta", "rms_norm_eps"):
        field(config, key, where=where)
    return llms.config_from_json(config | {"model_type": family, "vocab_size": 1}, where).stack


def _is_shuffled(config, where):
    return flag(config, "use_pixel_shuffle_proj", where=where)


def _pixel_shuffle(config, where):
    if not _is_shuffled(config, where):
        return "none"
    only(config, "downsample_ratio", (0.5,), 0.5, where)
    return only(config, "pixel_shuffle_loc", ("pre", "post"), where=where)


def _num_special_tokens(config, vocab_size, where):
    """The number of rows of the second table; its ids continue the first table's."""
    ids = sorted(table(config, "special_token_maps", where=where).values()) if config.get("special_token_maps") else []
    if ids != list(range(vocab_size, vocab_size + len(ids))):
        raise UserError(
            f"{where}: special_token_maps has ids {ids}; they must count up from llm_vocab_size={vocab_size}"
        )
    return len(ids)


def config_to_json(config: HoVLEConfig, image_id: int, special_tokens: dict[str, int]) -> dict[str, Any]:
    """The public config.json; the inverse of `config_from_json`.

    Args:
      image_id: the id of <IMG_CONTEXT>.
      special_tokens: {token: id}; it names the rows of the embedding's second table.
    """
    c = config.embedding
    if c.family == "internlm2":
        internlm2.check_plain(c.stack)
        if c.stack.qkv_bias:
            raise UserError("HoVLE's public embedding layer has no biases: give the embedding another family's layers")
        scaling, max_length = internlm2.scaling_to_json(c.stack.rope_scaling, config.llm.max_length)
        layers = internlm2.stack_to_json(c.stack) | {"attention_bias": False, "mlp_bias": False}
        layers |= {"max_position_embeddings": max_length, "rope_scaling": scaling}
    else:
        layers = llms.config_to_json(LLMConfig(c.stack, c.vocab_size, config.llm.max_length, family=c.family))
        layers = {k: x for k, x in layers.items() if k not in ("model_type", "vocab_size", "tie_word_embeddings")}
        layers |= {"layer_type": c.family}
    names = {i: token for token, i in special_tokens.items()}
    second_table = range(c.vocab_size, c.vocab_size + c.num_special_tokens)
    variant = {"use_pixel_shuffle_proj": c.pixel_shuffle != "none"}
    if c.pixel_shuffle != "none":
        variant |= {"pixel_shuffle_loc": c.pixel_shuffle, "downsample_ratio": 0.5}
    embedding = {
        **layers,
        "architectures": ["HolisticEmbedding"],
        "num_channels": 3,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "use_ls": False,
        "attn_implementation": "eager",  # the code's own default is flash attention, which needs a GPU
        "llm_vocab_size": c.vocab_size,
        "llm_hidden_size": c.stack.width,
        "img_context_token_id": image_id,
        "special_token_maps": {names.get(i, f"<special {i}>"): i for i in second_table},
        **variant,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "embedding_config": embedding,
        "llm_config": llms.config_to_json(config.llm),
        "force_image_size": c.tile_size,
        "downsample_ratio": 1.0 if c.pixel_shuffle == "none" else 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "normalize_encoder_output": c.normalize_output,
        **TILING,
    }


def embedding_rules(config: EmbeddingConfig) -> list[Rule]:
    """The rules of `HolisticEmbedding`; its tensors start with 'embedding_model.'."""
    optional = []
    if config.num_special_tokens:
        optional += [rule("special_text_embeddings.weight", "special_embedding/embedding", SAME)]
    if config.pixel_shuffle != "none":
        for index, name in ((0, "in"), (2, "out")):
            public, ours = f"pixel_shuffle_proj.{index}", f"pixel_shuffle_projection/{name}"
            optional += [
                rule(f"{public}.weight", f"{ours}/kernel", LINEAR),
                rule(f"{public}.bias", f"{ours}/bias", SAME),
            ]
    return [
        *patch_rules(config.patch_size, "vision_embeddings."),
        rule(
            "llm_text_embeddings.weight", "text_embedding/embedding", padded(SAME, config.vocab_size, config.table_rows)
        ),
        *nested(llms.stack_rules(config.stack, config.family, "encoder."), ours="stack"),
        *optional,
    ]


def rules(config: HoVLEConfig) -> list[Rule]:
    """The rules of the whole checkpoint: {'embedding', 'llm'}."""
    assert config.embedding is not None
    return [
        *nested(embedding_rules(config.embedding), public="embedding_model.", ours="embedding"),
        *nested(llms.rules(config.llm), public="language_model.", ours="llm"),
    ]
