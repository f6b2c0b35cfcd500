"""Llama, Qwen2 and Qwen3 (`LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`): one scheme of names.

What differs is which projections have biases, whether queries and keys are normalised, and the public defaults.
"""

import dataclasses
import math
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats import internlm2
from hovle_jax.formats.fields import REQUIRED, count, field, flag, number, only, table
from hovle_jax.formats.mapping import LINEAR, SAME, Rule, nested, padded, rule
from hovle_jax.model.config import LLMConfig, RopeScaling, StackConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """Defaults of the public config class, and what its code fixes.

    Attributes:
      kv_heads, head_dim: None = the number of heads, hidden_size / heads.
      biases: (qkv, output) that the code fixes; None = both are the config's `attention_bias`.
      mlp_bias: whether the config may ask for biases in the MLP.
      slides: whether a `sliding_window` in the config applies without being switched on.
    """

    max_length: int
    kv_heads: int | None = None
    head_dim: int | None = None
    biases: tuple[bool, bool] | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    slides: bool = False


FAMILIES = {
    "llama": Family(max_length=2048, mlp_bias=True),
    "qwen2": Family(max_length=32768, kv_heads=32, biases=(True, False)),
    "qwen3": Family(max_length=32768, kv_heads=32, head_dim=128, qk_norm=True),
}


def config_from_json(config: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """-> LLMConfig. Defaults are those of the public config classes."""
    kind = only(config, "model_type", tuple(FAMILIES), where=where)
    family = FAMILIES[kind]
    only(config, "hidden_act", internlm2.SILU, "silu", where)
    max_length = count(config, "max_position_embeddings", family.max_length, where)
    width, num_heads = (count(config, key, where=where) for key in ("hidden_size", "num_attention_heads"))
    num_layers = count(config, "num_hidden_layers", where=where, minimum=0)
    _check_window(config, family, num_layers, max_length, where)
    qkv_bias, output_bias = family.biases or (flag(config, "attention_bias", False, where),) * 2
    given = {key: value for key, value in config.items() if value is not None}
    head_dim = count(given, "head_dim", family.head_dim, where) or internlm2.head_dim(width, num_heads, where)
    num_kv_heads = count(
        given, "num_key_value_heads", None if "num_key_value_heads" in config else family.kv_heads, where
    )
    num_kv_heads = num_kv_heads or num_heads
    theta, scaling = _rope(config, max_length, head_dim, where)
    stack = StackConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=count(config, "intermediate_size", where=where),
        rope_theta=theta,
        norm_eps=number(config, "rms_norm_eps", 1e-6, where),
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=family.mlp_bias and flag(config, "mlp_bias", False, where),
        qk_norm=family.qk_norm,
    )
    stack.check(where)
    return LLMConfig(
        stack=stack,
        vocab_size=count(config, "vocab_size", where=where),
        max_length=max_length,
        tied=flag(config, "tie_word_embeddings", False, where),
        family=kind,
    )


def _rope(config, max_length, head_dim, where):
    """-> (theta, RopeScaling or None), from `rope_theta` beside `rope_scaling`, or the newer `rope_parameters`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = dict(table(config, key, {}, where) if config.get(key) else {})
    theta = number({"rope_theta": config.get("rope_theta", 10000.0)} | rope, "rope_theta", where=where)
    where = f"{where} {key}"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "dynamic":  # acts beyond max_position_embeddings, whatever original length is given
        return theta, RopeScaling("dynamic", number(rope, "factor", where=where), max_length)
    if kind not in ROPE_KINDS:
        known = ", ".join(("default", "dynamic", *ROPE_KINDS))
        raise UserError(f"{where}: rope_type={kind!r} is not supported; supported: {known}")
    original = count(rope, "original_max_position_embeddings", None, where) or max_length
    default = max_length / original if kind == "yarn" and rope.get("factor") is None else REQUIRED
    present = {key: value for key, value in rope.items() if value is not None}
    factor = number(present, "factor", 1.0 if kind == "longrope" else default, where)
    return theta, ROPE_KINDS[kind](RopeScaling(kind, factor, original), present, head_dim, max_length, where)


def _llama3(scaling, rope, head_dim, max_length, where):
    low, high = (number(rope, f"{name}_freq_factor", where=where) for name in ("low", "high"))
    return dataclasses.replace(scaling, low_frequency_factor=low, high_frequency_factor=high)


def _yarn(scaling, rope, head_dim, max_length, where):
    temperature = lambda scale: 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0
    factor = rope.get("attention_factor") or 0
    if not factor and rope.get("mscale") and rope.get("mscale_all_dim"):
        factor = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return dataclasses.replace(
        scaling,
        beta_fast=number(rope, "beta_fast", 32.0, where),
        beta_slow=number(rope, "beta_slow", 1.0, where),
        attention_factor=float(factor),
        truncate=only(rope, "truncate", (True, False), True, where),
    )


def _longrope(scaling, rope, head_dim, max_length, where):
    """Public code has separate factors for texts up to the original length; here one set serves all lengths."""
    short, long = (tuple(map(float, field(rope, f"{name}_factor", where=where))) for name in ("short", "long"))
    if short != long or len(long) != head_dim // 2:
        raise UserError(f"{where}: longrope is supported with short_factor = long_factor of {head_dim // 2} numbers")
    factor = rope.get("factor") or max_length / scaling.original_length
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(scaling.original_length))
    attention = number(rope, "attention_factor", attention, where)
    return dataclasses.replace(scaling, kind="factors", attention_factor=attention, factors=long)


ROPE_KINDS = {"linear": lambda scaling, *_: scaling, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _check_window(config, family, num_layers, max_length, where):
    """Refuses a sliding window that would hide a token (these keys are read as transformers reads them)."""
    window, is_used = config.get("sliding_window", 4096), flag(config, "use_sliding_window", False, where)
    if window is None or window >= max_length:
        return
    if family.slides:
        raise UserError(f"{where}: sliding_window={window} is not supported")
    if not is_used:
        return
    kinds = config.get("layer_types") or []
    sliding = "sliding_attention" in kinds if kinds else config.get("max_window_layers", 28) < num_layers
    if sliding:
        raise UserError(f"{where}: use_sliding_window=True is not supported (sliding_window={window})")


def config_to_json(config: LLMConfig) -> dict[str, Any]:
    """The public config.json; the inverse of `config_from_json`.

    Raises:
      UserError: options that the family's code does not have.
    """
    stack, kind = config.stack, config.family
    family = FAMILIES[kind]
    biases = family.biases or (stack.qkv_bias, stack.qkv_bias)
    if (stack.qkv_bias, stack.output_bias) != biases or (stack.mlp_bias and not family.mlp_bias):
        raise UserError(f"{kind}'s public code does not have these biases: {stack}")
    if stack.qk_norm != family.qk_norm:
        raise UserError(f"{kind}'s public code has {'no' * (not family.qk_norm)} norms of queries and keys: {stack}")
    scaling = stack.rope_scaling
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": internlm2.scaling_to_json(scaling, config.max_length)[1],
        **internlm2.stack_to_json(stack),
        "head_dim": stack.head_dim,
        **({} if family.biases else {"attention_bias": stack.qkv_bias}),
        **({"mlp_bias": stack.mlp_bias} if family.mlp_bias else {"use_sliding_window": False}),
        "rope_scaling": None if scaling is None else _scaling_to_json(scaling),
        "tie_word_embeddings": config.tied,
    }


def _scaling_to_json(scaling: RopeScaling):
    if scaling.kind == "factors":
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.factors),
            "long_factor": list(scaling.factors),
            "attention_factor": scaling.attention_factor or 1.0,
            "original_max_position_embeddings": scaling.original_length,
        }
    common = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        common |= {"low_freq_factor": low, "high_freq_factor": high}
    if scaling.kind == "yarn":
        common |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            common |= {"attention_factor": scaling.attention_factor}
        if not scaling.truncate:
            common |= {"truncate": False}
    return common


def stack_rules(config: StackConfig, public: str) -> list[Rule]:
    """The rules of a `Stack`; `public` is what precedes the layers' numbers, such as 'model.layers.'."""
    linears = {
        "self_attn.q_proj": ("query", config.qkv_bias),
        "self_attn.k_proj": ("key", config.qkv_bias),
        "self_attn.v_proj": ("value", config.qkv_bias),
        "self_attn.o_proj": ("output", config.output_bias),
        "mlp.gate_proj": ("gate", config.mlp_bias),
        "mlp.up_proj": ("up", config.mlp_bias),
        "mlp.down_proj": ("down", config.mlp_bias),
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}
    layer = [
        *((f"{name}.weight", f"{ours}/kernel", LINEAR) for name, (ours, _) in linears.items()),
        *((f"{name}.bias", f"{ours}/bias", SAME) for name, (ours, has_bias) in linears.items() if has_bias),
        *((f"{name}.weight", f"{ours}/scale", SAME) for name, ours in norms.items()),
    ]
    rules = [rule(*entry, num_layers=config.num_layers) for entry in layer]
    return nested(rules, public=public + "{layer}.", ours="layers")


def rules(config: LLMConfig) -> list[Rule]:
    """The rules of `LanguageModel`."""
    rows = config.vocab_size, config.table_rows
    return [
        rule("model.embed_tokens.weight", "token_embedding/embedding", padded(SAME, *rows)),
        *nested(stack_rules(config.stack, "model.layers."), ours="stack"),
        rule("model.norm.weight", "norm/scale", SAME),
        *internlm2.head_rules(config, "lm_head.weight"),
    ]
