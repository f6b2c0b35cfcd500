"""InternVL2 (`InternVLChatModel` over InternViT): the teacher's tower and projector, and the LLM."""

import dataclasses
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats import internlm2, llms
from hovle_jax.formats.fields import count, flag, number, only, table
from hovle_jax.formats.mapping import (
    CLASS_TOKEN,
    LINEAR,
    POSITIONS,
    SAME,
    STACKED_BIAS,
    STACKED_QKV,
    Rule,
    nested,
    patch_kernel,
    rule,
)
from hovle_jax.model.config import LLMConfig, ViTConfig
from hovle_jax.model.teacher_config import TeacherConfig


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """The components of an InternVL2 checkpoint: {'teacher': {'vision', 'mlp1'}, 'llm'}."""

    vision: ViTConfig
    llm: LLMConfig

    @property
    def teacher(self) -> TeacherConfig:
        return TeacherConfig("internvit", self.vision, projector="mlp1", projector_width=self.llm.stack.width)


def config_from_json(config: dict[str, Any], where: str = "config.json") -> InternVLConfig:
    """-> InternVLConfig. Defaults are those of the public `InternVLChatConfig`."""
    only(config, "select_layer", (-1,), -1, where)
    only(config, "downsample_ratio", (0.5,), 0.5, where)
    only(config, "ps_version", ("v2",), "v1", where)
    return InternVLConfig(
        vision=vision_from_json(table(config, "vision_config", where=where), f"{where} vision_config"),
        llm=llms.config_from_json(table(config, "llm_config", where=where), f"{where} llm_config"),
    )


def vision_from_json(config: dict[str, Any], where: str = "config.json") -> ViTConfig:
    """-> ViTConfig of an InternViT. Defaults are those of the public `InternVisionConfig`."""
    only(config, "num_channels", (3,), 3, where)
    width, num_heads = (count(config, key, where=where) for key in ("hidden_size", "num_attention_heads"))
    internlm2.head_dim(width, num_heads, where)
    image_size, patch_size = (count(config, key, where=where) for key in ("image_size", "patch_size"))
    if image_size % patch_size:
        raise UserError(f"{where}: image_size={image_size} must be a multiple of patch_size={patch_size}")
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        num_layers=count(config, "num_hidden_layers", where=where),
        num_heads=num_heads,
        mlp_width=count(config, "intermediate_size", where=where),
        norm=only(config, "norm_type", ("layer_norm", "rms_norm"), "rms_norm", where),
        norm_eps=number(config, "layer_norm_eps", 1e-6, where),
        activation=only(config, "hidden_act", ("gelu",), "gelu", where),
        qkv_bias=flag(config, "qkv_bias", False, where),
        qk_norm=flag(config, "qk_normalization", True, where),
        patch_bias=True,
        layer_scale=True,
    )


# How an image is split into tiles in the published checkpoints; the code's own default is not to split it.
TILING = {"dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12}


def config_to_json(config: InternVLConfig) -> dict[str, Any]:
    """The public config.json; the inverse of `config_from_json`."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": vision_to_json(config.vision),
        "llm_config": llms.config_to_json(config.llm),
        "force_image_size": config.vision.image_size,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        **TILING,
    }


def vision_to_json(config: ViTConfig) -> dict[str, Any]:
    """The public config of an InternViT. Raises UserError for another tower, such as CLIP's."""
    if config.pre_norm or config.post_norm or not config.layer_scale or not config.patch_bias:
        raise UserError("this tower is not an InternViT (CLIP's have other norms): it cannot be written in its format")
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "norm_type": config.norm,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm,
    }


def patch_rules(patch_size: int, public: str) -> list[Rule]:
    """The rules of InternViT's and HoVLE's class token, positions and patch convolution; `public` is a prefix."""
    return [
        rule(public + "class_embedding", "class_embedding", CLASS_TOKEN),
        rule(public + "position_embedding", "class_position position_embedding", POSITIONS),
        rule(public + "patch_embedding.weight", "patch_embedding/kernel", patch_kernel(patch_size)),
        rule(public + "patch_embedding.bias", "patch_embedding/bias", SAME),
    ]


def vision_rules(config: ViTConfig) -> list[Rule]:
    """The rules of an InternViT as `VisionTransformer`."""
    layer = [
        ("attn.qkv.weight", "query/kernel key/kernel value/kernel", STACKED_QKV),
        *([("attn.qkv.bias", "query/bias key/bias value/bias", STACKED_BIAS)] if config.qkv_bias else []),
        *([("attn.q_norm.weight", "query_norm/scale", SAME)] if config.qk_norm else []),
        *([("attn.k_norm.weight", "key_norm/scale", SAME)] if config.qk_norm else []),
        *_linear("attn.proj", "output"),
        *_linear("mlp.fc1", "up"),
        *_linear("mlp.fc2", "down"),
        *_norm(config.norm, "norm1"),
        *_norm(config.norm, "norm2"),
        ("ls1", "scale1", SAME),
        ("ls2", "scale2", SAME),
    ]
    layers = [rule(*entry, num_layers=config.num_layers) for entry in layer]
    return [
        *patch_rules(config.patch_size, "embeddings."),
        *nested(layers, public="encoder.layers.{layer}.", ours="layers"),
    ]


def tower_rules(config: ViTConfig) -> list[Rule]:
    """The rules of a checkpoint that is an InternViT alone: {'teacher': {'vision'}}."""
    return nested(vision_rules(config), ours="teacher/vision")


def _linear(public, ours):
    return [(f"{public}.weight", f"{ours}/kernel", LINEAR), (f"{public}.bias", f"{ours}/bias", SAME)]


def _norm(kind, name):
    if kind == "rms_norm":
        return [(f"{name}.weight", f"{name}/scale", SAME)]
    return [(f"{name}.weight", f"{name}/norm/scale", SAME), (f"{name}.bias", f"{name}/norm/bias", SAME)]


def teacher_rules(config: InternVLConfig) -> list[Rule]:
    """The rules of `VisionTeacher` with the 'mlp1' projector; its tensors start with 'vision_model.' or 'mlp1.'."""
    projector = [
        rule("0.weight", "norm/norm/scale", SAME),
        rule("0.bias", "norm/norm/bias", SAME),
        *[rule(*entry) for entry in _linear("1", "in") + _linear("3", "out")],
    ]
    return [
        *nested(vision_rules(config.vision), public="vision_model.", ours="vision"),
        *nested(projector, public="mlp1.", ours="mlp1"),
    ]


def rules(config: InternVLConfig) -> list[Rule]:
    """The rules of the whole checkpoint: {'teacher': {'vision', 'mlp1'}, 'llm'}."""
    return [
        *nested(teacher_rules(config), ours="teacher"),
        *nested(llms.rules(config.llm), public="language_model.", ours="llm"),
    ]
