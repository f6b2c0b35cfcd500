"""The LLM of a checkpoint, of whichever family: one place that knows them all."""

from hovle_jax.formats import internlm2, llama
from hovle_jax.formats.fields import only
from hovle_jax.model.config import LLMConfig, StackConfig

TABLES = {"internlm2": "model.tok_embeddings.weight", **dict.fromkeys(llama.FAMILIES, "model.embed_tokens.weight")}
MODULES = {"internlm2": internlm2, **dict.fromkeys(llama.FAMILIES, llama)}


def config_from_json(config, where="config.json"):
    """-> LLMConfig of a public LLM config, as part of another one."""
    config = named(config)
    return MODULES[only(config, "model_type", tuple(MODULES), where=where)].config_from_json(config, where)


def named(config):
    """A public LLM config with its `model_type`: where it has none, `architectures` says it, else it is InternLM2's."""
    architecture = (config.get("architectures") or ["InternLM2ForCausalLM"])[0]
    return {"model_type": str(architecture).removesuffix("ForCausalLM").lower()} | config


def config_to_json(config: LLMConfig):
    """The inverse. Raises UserError for options that the family does not have."""
    return MODULES[config.family].config_to_json(config)


def rules(config: LLMConfig):
    """Rules of `LanguageModel`."""
    return MODULES[config.family].rules(config)


def stack_rules(config: StackConfig, family, public):
    """Rules of a `Stack` of a family's layers, for the holistic embedding."""
    return MODULES[family].stack_rules(config, public)
