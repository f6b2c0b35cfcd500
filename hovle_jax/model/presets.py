"""The sizes of models by name. The recipes (data, steps, learning rates) are in the files of configs/."""

import dataclasses
from typing import Any

from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig, TextTowerConfig
from hovle_jax.model.config import (
    CLIP_MEAN,
    CLIP_STD,
    EmbeddingConfig,
    HoVLEConfig,
    LLMConfig,
    RopeScaling,
    StackConfig,
    ViTConfig,
)
from hovle_jax.model.teacher_config import TeacherConfig


def tiny_model() -> HoVLEConfig:
    """HoVLE for 64-pixel images and two CPU cores."""
    layer: dict[str, Any] = dict(width=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384)
    # Distillation fixes directions, not lengths. Unit outputs are about as long as the LLM's token vectors, so that
    # what the LLM can do with text survives; a small LLM would otherwise have to learn it anew.
    embedding = EmbeddingConfig(
        stack=StackConfig(num_layers=4, **layer), image_size=64, patch_size=8, vocab_size=512, normalize_output=True
    )
    llm = LLMConfig(stack=StackConfig(num_layers=3, **layer), vocab_size=512, max_length=2048)
    return HoVLEConfig(embedding=embedding, llm=llm)


def tiny_tower() -> ViTConfig:
    """CLIP's image tower for 64-pixel images."""
    return ViTConfig(
        image_size=64, patch_size=8, width=96, num_layers=5, num_heads=3, mlp_width=384, norm_eps=1e-5,
        layer_scale=False, patch_bias=False, pre_norm=True, post_norm=True,
    )  # fmt: skip


def tiny_clip() -> CLIPConfig:
    text = TextTowerConfig(vocab_size=512, width=64, num_layers=2, num_heads=2, mlp_width=256, context=16, end_id=2)
    return CLIPConfig(vision=tiny_tower(), text=text, projection_width=64)


def emoji_clip() -> CLIPConfig:
    """For emoji of 64 pixels, and two CPU cores: of so few images a ResNet learns more than a ViT."""
    vision = ResNetConfig(image_size=64, width=16, layers=(1, 1, 1, 1), num_heads=8)
    text = TextTowerConfig(vocab_size=1024, width=128, num_layers=2, num_heads=4, mlp_width=512, context=20, end_id=2)
    return CLIPConfig(vision=vision, text=text, projection_width=128, batch_statistics=True)


def published_clip(patch_size: int, large: bool = False) -> CLIPConfig:
    """OpenAI's CLIP of 224 pixels: ViT-B/32, B/16 or, `large`, L/14 (Radford et al. 2021, table 20)."""
    widths: dict[str, Any] = dict(width=1024, num_layers=24, num_heads=16, mlp_width=4096)
    texts: dict[str, Any] = dict(width=768, num_heads=12, mlp_width=3072)
    if not large:
        widths = dict(width=768, num_layers=12, num_heads=12, mlp_width=3072)
        texts = dict(width=512, num_heads=8, mlp_width=2048)
    vision = ViTConfig(
        image_size=224, patch_size=patch_size, norm_eps=1e-5, activation="quick_gelu", layer_scale=False,
        patch_bias=False, pre_norm=True, post_norm=True, image_mean=CLIP_MEAN, image_std=CLIP_STD, **widths,
    )  # fmt: skip
    text = TextTowerConfig(vocab_size=49408, num_layers=12, context=77, end_id=49407, activation="quick_gelu", **texts)
    return CLIPConfig(vision=vision, text=text, projection_width=text.width)


def so400m() -> CLIPConfig:
    """SigLIP-so400m/14 of 224 pixels (Zhai et al. 2023; Alabdulmohsin et al. 2023 for its shape)."""
    sizes: dict[str, Any] = dict(
        width=1152, num_layers=27, num_heads=16, mlp_width=4304, norm_eps=1e-6, activation="gelu_tanh"
    )
    vision = ViTConfig(
        image_size=224, patch_size=14, layer_scale=False, post_norm=True, norm_tokens=True, pooling="map",
        class_token=False, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), **sizes,
    )  # fmt: skip
    text = TextTowerConfig(vocab_size=32000, context=64, end_id=1, causal=False, pooling="last", pad_id=1, **sizes)
    return CLIPConfig(
        vision=vision, text=text, projection_width=1152, loss="sigmoid",
        vision_projection="none", text_projection="bias", family="siglip", scalar_scale=False,
    )  # fmt: skip


def smol_model() -> HoVLEConfig:
    """HoVLE for 64-pixel images over SmolLM2-135M-Instruct, whose vocabulary ends before the three image tokens."""
    stack = StackConfig(
        num_layers=30, width=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_width=1536, rope_theta=1e5
    )
    embedding = EmbeddingConfig(
        stack=dataclasses.replace(stack, num_layers=4), image_size=64, patch_size=8, vocab_size=49152,
        num_special_tokens=3, family="llama",
    )  # fmt: skip
    llm = LLMConfig(stack=stack, vocab_size=49152, max_length=8192, tied=True, family="llama")
    return HoVLEConfig(embedding=embedding, llm=llm)


def hovle_model(pixel_shuffle: str = "pre") -> HoVLEConfig:
    """The paper's sizes: 2,606,327,808 parameters over InternLM2-chat-1.8B (pixel_shuffle='post': HoVLE-HD)."""
    layer: dict[str, Any] = dict(width=2048, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=8192)
    embedding = EmbeddingConfig(
        stack=StackConfig(num_layers=8, **layer), image_size=448, patch_size=14, vocab_size=92553,
        pixel_shuffle=pixel_shuffle,
    )  # fmt: skip
    # As published; it does nothing up to 32,768 tokens.
    stack = StackConfig(num_layers=24, rope_scaling=RopeScaling("dynamic", 2.0, 32768), **layer)
    return HoVLEConfig(embedding=embedding, llm=LLMConfig(stack=stack, vocab_size=92553))


def internvit_300m() -> ViTConfig:
    """InternViT-300M-448px, the teacher's tower."""
    return ViTConfig(image_size=448, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096)


MODELS = {"tiny": tiny_model, "smol": smol_model, "hovle": hovle_model, "hovle_hd": lambda: hovle_model("post")}
CLIPS = {
    "tiny": tiny_clip,
    "emoji": emoji_clip,
    "vit_b32": lambda: published_clip(32),
    "vit_b16": lambda: published_clip(16),
    "vit_l14": lambda: published_clip(14, large=True),
    "so400m": so400m,
}
TEACHERS = {
    "tiny": lambda: TeacherConfig(kind="clip", vision=tiny_tower(), projector="linear"),
    "hovle": lambda: TeacherConfig("internvit", internvit_300m(), projector="mlp1", projector_width=2048),
}
