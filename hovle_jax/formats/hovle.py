"""HoVLE and HoVLE-HD as published: the holistic embedding beside the LLM."""

from hovle_jax.config import EmbeddingConfig, HoVLEConfig
from hovle_jax.errors import UserError
from hovle_jax.formats import internlm2
from hovle_jax.formats.fields import field, only
from hovle_jax.formats.internvl import patch_rules
from hovle_jax.formats.mapping import LINEAR, SAME, nested, rule


def config_from_json(config):
    """-> HoVLEConfig; `image_size` is that of the learned positions, other tile sizes resize them."""
    only(config, "ps_version", ("v2",), "v2")
    model = HoVLEConfig(
        embedding=_embedding_from_json(
            field(config, "embedding_config"),
            normalize_output=field(config, "normalize_encoder_output", False),
            where="config.json embedding_config",
        ),
        llm=internlm2.config_from_json(field(config, "llm_config"), "config.json llm_config"),
    )
    model.check()
    return model


def _embedding_from_json(config, normalize_output, where):
    """-> EmbeddingConfig. The rotary base and the variant are published nowhere else, so they have no default."""
    only(config, "num_channels", (3,), 3, where)
    only(config, "hidden_act", ("silu",), "silu", where)
    for key in ("attention_bias", "mlp_bias", "use_ls"):
        only(config, key, (False,), False, where)
    vocab_size = field(config, "llm_vocab_size", where=where)
    return EmbeddingConfig(
        stack=internlm2.stack_from_json(
            config,
            rope_theta=field(config, "rope_theta", where=where),
            norm_eps=field(config, "rms_norm_eps", where=where),
            where=where,
        ),
        image_size=field(config, "image_size", where=where),
        patch_size=field(config, "patch_size", where=where),
        vocab_size=vocab_size,
        pixel_shuffle=_pixel_shuffle(config, where),
        num_special_tokens=_num_special_tokens(config, vocab_size, where),
        normalize_output=normalize_output,
    )


def _pixel_shuffle(config, where):
    if not field(config, "use_pixel_shuffle_proj", where=where):
        return "none"
    only(config, "downsample_ratio", (0.5,), 0.5, where)
    return only(config, "pixel_shuffle_loc", ("pre", "post"), where=where)


def _num_special_tokens(config, vocab_size, where):
    """Rows of the second table; its ids continue the first table's."""
    ids = sorted((config.get("special_token_maps") or {}).values())
    if ids != list(range(vocab_size, vocab_size + len(ids))):
        raise UserError(
            f"{where}: special_token_maps has ids {ids}; they must count up from llm_vocab_size={vocab_size}"
        )
    return len(ids)


def embedding_rules(config: EmbeddingConfig):
    """Rules of `HolisticEmbedding`; its tensors start with 'embedding_model.'."""
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
        rule("llm_text_embeddings.weight", "text_embedding/embedding", SAME),
        *nested(internlm2.stack_rules(config.stack, "encoder."), ours="stack"),
        *optional,
    ]


def rules(config: HoVLEConfig):
    """Rules of the whole checkpoint: {'embedding', 'llm'}."""
    return [
        *nested(embedding_rules(config.embedding), public="embedding_model.", ours="embedding"),
        *nested(internlm2.rules(config.llm), public="language_model.", ours="llm"),
    ]
