"""The LLM of a checkpoint, of any family: the one place that knows them all."""

from typing import Any

from hovle_jax.formats import internlm2, llama
from hovle_jax.formats.fields import only
from hovle_jax.formats.mapping import Rule
from hovle_jax.model.config import LLMConfig, StackConfig

TABLES = {"internlm2": "model.tok_embeddings.weight", **dict.fromkeys(llama.FAMILIES, "model.embed_tokens.weight")}
MODULES: dict[str, Any] = {"internlm2": internlm2, **dict.fromkeys(llama.FAMILIES, llama)}


def config_from_json(config: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """-> LLMConfig of a public LLM config, which may be nested in a larger one."""
    config = with_model_type(config)
    return MODULES[only(config, "model_type", tuple(MODULES), where=where)].config_from_json(config, where)


def with_model_type(config: dict[str, Any]) -> dict[str, Any]:
    """A public LLM config with a `model_type`: its own, else from `architectures`, else InternLM2's."""
    architecture = (config.get("architectures") or ["InternLM2ForCausalLM"])[0]
    return {"model_type": str(architecture).removesuffix("ForCausalLM").lower()} | config


def config_to_json(config: LLMConfig) -> dict[str, Any]:
    """The inverse. Raises UserError for options that the family does not have."""
    return MODULES[config.family].config_to_json(config)


def rules(config: LLMConfig) -> list[Rule]:
    """The rules of `LanguageModel`."""
    return MODULES[config.family].rules(config)


def stack_rules(config: StackConfig, family: str, public: str) -> list[Rule]:
    """The rules of a `Stack` of a family's layers, for the holistic embedding."""
    return MODULES[family].stack_rules(config, public)
