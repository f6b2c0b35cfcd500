"""Llama, Qwen2 and Qwen3 (`LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`): one scheme of names.

What differs is which projections have biases, whether queries and keys are normalised, and the public defaults.
"""

import dataclasses

from hovle_jax.config import LLMConfig, RopeScaling, StackConfig
from hovle_jax.errors import UserError
from hovle_jax.formats import internlm2
from hovle_jax.formats.fields import field, only
from hovle_jax.formats.mapping import LINEAR, SAME, nested, padded, rule


@dataclasses.dataclass(frozen=True)
class Family:
    """The public config class's defaults and what is fixed in its code.

    Attributes:
      kv_heads, head_dim: None = the number of heads, hidden_size / heads.
      biases: (qkv, output) that the code fixes; None = both are the config's `attention_bias`.
      mlp_bias: whether the config may ask for it.
    """

    max_length: int
    kv_heads: int | None = None
    head_dim: int | None = None
    biases: tuple[bool, bool] | None = None
    mlp_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(max_length=2048, mlp_bias=True),
    "qwen2": Family(max_length=32768, kv_heads=32, biases=(True, False)),
    "qwen3": Family(max_length=32768, kv_heads=32, head_dim=128, qk_norm=True),
}


def config_from_json(config, where="config.json"):
    """-> LLMConfig. Defaults are those of the public config classes."""
    kind = only(config, "model_type", tuple(FAMILIES), where=where)
    family = FAMILIES[kind]
    only(config, "hidden_act", ("silu",), "silu", where)
    only(config, "use_sliding_window", (False, None), False, where)
    max_length = field(config, "max_position_embeddings", family.max_length, where)
    width, num_heads = (field(config, key, where=where) for key in ("hidden_size", "num_attention_heads"))
    qkv_bias, output_bias = family.biases or (field(config, "attention_bias", False, where),) * 2
    theta, scaling = _rope(config, max_length, where)
    stack = StackConfig(
        num_layers=field(config, "num_hidden_layers", where=where),
        width=width,
        num_heads=num_heads,
        num_kv_heads=field(config, "num_key_value_heads", family.kv_heads, where) or num_heads,
        head_dim=field(config, "head_dim", family.head_dim, where) or internlm2.head_dim(width, num_heads, where),
        mlp_width=field(config, "intermediate_size", where=where),
        rope_theta=theta,
        norm_eps=float(field(config, "rms_norm_eps", 1e-6, where)),
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=family.mlp_bias and field(config, "mlp_bias", False, where),
        qk_norm=family.qk_norm,
    )
    stack.check(where)
    return LLMConfig(
        stack=stack,
        vocab_size=field(config, "vocab_size", where=where),
        max_length=max_length,
        tied=field(config, "tie_word_embeddings", False, where),
        family=kind,
    )


def _rope(config, max_length, where):
    """-> (theta, RopeScaling or None), from `rope_theta` beside `rope_scaling`, or the newer `rope_parameters`."""
    rope = dict(config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)})
    rope |= config.get("rope_scaling") or {}
    where = f"{where} rope_scaling"
    theta, kind = float(rope.get("rope_theta", 10000.0)), rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic NTK does nothing up to max_position_embeddings, our max_length
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"{where}: rope_type={kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn"
        )
    scaling = RopeScaling(
        kind=kind,
        factor=float(field(rope, "factor", where=where)),
        original_length=int(rope.get("original_max_position_embeddings") or max_length),
    )
    if kind == "llama3":
        scaling = dataclasses.replace(
            scaling,
            original_length=int(field(rope, "original_max_position_embeddings", where=where)),
            low_frequency_factor=float(field(rope, "low_freq_factor", where=where)),
            high_frequency_factor=float(field(rope, "high_freq_factor", where=where)),
        )
    if kind == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            only(rope, key, (None, 0), None, where)
        only(rope, "truncate", (True,), True, where)
        scaling = dataclasses.replace(
            scaling,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            attention_factor=float(rope.get("attention_factor") or 0),
        )
    return theta, scaling


def config_to_json(config: LLMConfig):
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
        "max_position_embeddings": config.max_length,
        **internlm2.stack_to_json(stack),
        "head_dim": stack.head_dim,
        **({} if family.biases else {"attention_bias": stack.qkv_bias}),
        **({"mlp_bias": stack.mlp_bias} if family.mlp_bias else {"use_sliding_window": False}),
        "rope_scaling": None if scaling is None else _scaling_to_json(scaling),
        "tie_word_embeddings": config.tied,
    }


def _scaling_to_json(scaling: RopeScaling):
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
    return common


def stack_rules(config: StackConfig, public):
    """Rules of a `Stack`; `public` is what stands before the layers' numbers, as 'model.layers.'."""
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


def rules(config: LLMConfig):
    """Rules of `LanguageModel`; a tied head is not in the file."""
    rows = config.vocab_size, config.table_rows
    return [
        rule("model.embed_tokens.weight", "token_embedding/embedding", padded(SAME, *rows)),
        *nested(stack_rules(config.stack, "model.layers."), ours="stack"),
        rule("model.norm.weight", "norm/scale", SAME),
        *([] if config.tied else [rule("lm_head.weight", "head/kernel", padded(LINEAR, *rows))]),
    ]
