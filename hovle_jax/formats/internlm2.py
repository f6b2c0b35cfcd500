"""InternLM2 (`InternLM2ForCausalLM`), and its decoder layers, which the holistic embedding shares."""

import dataclasses
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats.fields import count, flag, number, only, table
from hovle_jax.formats.mapping import LINEAR, SAME, Rule, nested, packed_wqkv, padded, rule
from hovle_jax.model.config import LLMConfig, RopeScaling, StackConfig

SILU = ("silu", "swish")  # two names of one function


def config_from_json(config: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """-> LLMConfig. Defaults are those of the public `InternLM2Config`."""
    _check_supported(config, where)
    stack = stack_from_json(
        config,
        rope_theta=number(config, "rope_theta", 10000.0, where),
        norm_eps=number(config, "rms_norm_eps", 1e-6, where),
        where=where,
    )
    bias = flag(config, "bias", True, where)
    max_length = count(config, "max_position_embeddings", 2048, where)
    return LLMConfig(
        stack=dataclasses.replace(
            stack, qkv_bias=bias, output_bias=bias, rope_scaling=scaling_from_json(config, max_length, where)
        ),
        vocab_size=count(config, "vocab_size", where=where),
        max_length=max_length,
        tied=flag(config, "tie_word_embeddings", False, where),
    )


def _check_supported(config, where):
    only(config, "model_type", ("internlm2",), "internlm2", where)
    only(config, "hidden_act", SILU, "silu", where)
    only(config, "rope_pos_id_version", ("default",), "default", where)


SCALINGS = ("linear", "dynamic")


def scaling_from_json(config: dict[str, Any], max_length: int, where: str) -> RopeScaling | None:
    """-> RopeScaling or None, of the LLM or of the embedding; `max_length` is where 'dynamic' starts to act."""
    scaling = table(config, "rope_scaling", {}, where) if config.get("rope_scaling") else {}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind is None and not scaling:
        return None
    if kind not in SCALINGS:
        raise UserError(f"{where}: rope_scaling={scaling!r} is not supported; supported: null, 'linear', 'dynamic'")
    return RopeScaling(kind, number(scaling, "factor", where=f"{where} rope_scaling"), max_length)


def scaling_to_json(scaling: RopeScaling | None, max_length: int) -> tuple[dict[str, Any] | None, int]:
    """-> (`rope_scaling`, `max_position_embeddings`), the inverse: 'dynamic' acts beyond the latter."""
    if scaling is None:
        return None, max_length
    public = {"type": scaling.kind, "factor": scaling.factor}
    return public, scaling.original_length if scaling.kind == "dynamic" else max_length


def stack_from_json(
    config: dict[str, Any], rope_theta: float, norm_eps: float, where: str = "config.json"
) -> StackConfig:
    """-> StackConfig from the keys that the LLM's and the embedding's configs share."""
    width, num_heads = (count(config, key, where=where) for key in ("hidden_size", "num_attention_heads"))
    stack = StackConfig(
        num_layers=count(config, "num_hidden_layers", where=where, minimum=0),
        width=width,
        num_heads=num_heads,
        num_kv_heads=count(config, "num_key_value_heads", None, where) or num_heads,
        head_dim=head_dim(width, num_heads, where),
        mlp_width=count(config, "intermediate_size", where=where),
        rope_theta=rope_theta,
        norm_eps=norm_eps,
    )
    stack.check(where)
    return stack


def head_dim(width: int, num_heads: int, where: str) -> int:
    """The size of a head where the config does not name one. Raises UserError when the width does not divide."""
    if width % num_heads:
        raise UserError(f"{where}: hidden_size={width} must be a multiple of num_attention_heads={num_heads}")
    return width // num_heads


def config_to_json(config: LLMConfig) -> dict[str, Any]:
    """The public config.json of an LLM; the inverse of `config_from_json`.

    Raises:
      UserError: options that InternLM2's code does not have.
    """
    stack = config.stack
    check_plain(stack)
    scaling, max_length = scaling_to_json(stack.rope_scaling, config.max_length)
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": max_length,
        **stack_to_json(stack),
        "bias": stack.qkv_bias,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def check_plain(stack: StackConfig) -> None:
    """Raises UserError for what InternLM2's layer does not have."""
    extra = {
        "biases but those of all attention projections": stack.mlp_bias or stack.qkv_bias != stack.output_bias,
        "norms of queries and keys": stack.qk_norm,
        "rotary positions scaled in this way": stack.rope_scaling is not None
        and stack.rope_scaling.kind not in SCALINGS,
        f"a head_dim of {stack.head_dim}": stack.head_dim * stack.num_heads != stack.width,
    }
    if any(extra.values()):
        found = ", ".join(name for name, present in extra.items() if present)
        raise UserError(f"InternLM2's public layer has no {found}: this stack cannot be written in its format")


def stack_to_json(stack: StackConfig) -> dict[str, Any]:
    """The keys that the LLM's and the embedding's configs share."""
    return {
        "hidden_size": stack.width,
        "intermediate_size": stack.mlp_width,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": stack.norm_eps,
        "rope_theta": stack.rope_theta,
    }


def stack_rules(config: StackConfig, public: str) -> list[Rule]:
    """The rules of a `Stack`; `public` is what precedes the layers' numbers, such as 'model.layers.'."""
    wqkv = packed_wqkv(config.num_heads, config.num_kv_heads, config.head_dim)
    layer = [
        ("attention.wqkv.weight", "query/kernel key/kernel value/kernel", wqkv),
        ("attention.wo.weight", "output/kernel", LINEAR),
        ("attention_norm.weight", "attention_norm/scale", SAME),
        ("feed_forward.w1.weight", "gate/kernel", LINEAR),
        ("feed_forward.w3.weight", "up/kernel", LINEAR),
        ("feed_forward.w2.weight", "down/kernel", LINEAR),
        ("ffn_norm.weight", "ffn_norm/scale", SAME),
    ]
    if config.qkv_bias:
        layer += [("attention.wqkv.bias", "query/bias key/bias value/bias", wqkv)]
    if config.output_bias:
        layer += [("attention.wo.bias", "output/bias", SAME)]
    rules = [rule(*entry, num_layers=config.num_layers) for entry in layer]
    return nested(rules, public=public + "{layer}.", ours="layers")


def head_rules(config: LLMConfig, public: str) -> list[Rule]:
    """The rules of an LLM's head; a tied head is rarely in the file, and then as a copy."""
    rows = config.vocab_size, config.table_rows
    if config.tied:
        return [rule(public, "token_embedding/embedding", padded(SAME, *rows))] if config.head_stored else []
    return [rule(public, "head/kernel", padded(LINEAR, *rows))]


def rules(config: LLMConfig) -> list[Rule]:
    """The rules of `LanguageModel`."""
    rows = config.vocab_size, config.table_rows
    return [
        rule("model.tok_embeddings.weight", "token_embedding/embedding", padded(SAME, *rows)),
        *nested(stack_rules(config.stack, "model.layers."), ours="stack"),
        rule("model.norm.weight", "norm/scale", SAME),
        *head_rules(config, "output.weight"),
    ]
