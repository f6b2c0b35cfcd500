"""CLIP and SigLIP in Hugging Face's layout (`CLIPModel`, `SiglipModel`): one scheme of names.

What differs is how the towers pool and project, and the public defaults. SigLIP 2 of a fixed resolution is a SigLIP.
"""

import dataclasses
import pathlib
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats.fields import colours, count, flag, number, only, read_object, table
from hovle_jax.formats.mapping import (
    CLASS_TOKEN,
    LINEAR,
    POSITION_ROWS,
    ROW,
    SAME,
    SCALAR,
    STACKED_BIAS,
    STACKED_QKV,
    Rule,
    nested,
    patch_kernel,
    rule,
)
from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig, TextTowerConfig
from hovle_jax.model.config import CLIP_MEAN, CLIP_STD, ViTConfig

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
PREPROCESSOR = "preprocessor_config.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
HIGHEST = 2  # as eos_token_id: texts are read at their highest id, as old configs had this 2 whatever the tokenizer's


@dataclasses.dataclass(frozen=True)
class Tower:
    """Defaults of a tower's public config class."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_hidden_layers: int = 12


@dataclasses.dataclass(frozen=True)
class Family:
    """Defaults of the public config classes, and what their code fixes.

    Attributes:
      norm_eps, activation: of both towers.
      vocab_size, context, patch_size: of the towers.
      image_mean, image_std: where no preprocessor_config.json says otherwise.
    """

    text: Tower
    vision: Tower
    norm_eps: float
    activation: str
    vocab_size: int
    context: int
    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


HALF = (0.5, 0.5, 0.5)
BASE = Tower(768, 12, 3072)
FAMILIES = {
    "clip": Family(Tower(512, 8, 2048), BASE, 1e-5, "quick_gelu", 49408, 77, 32, CLIP_MEAN, CLIP_STD),
    "siglip": Family(BASE, BASE, 1e-6, "gelu_pytorch_tanh", 32000, 64, 16, HALF, HALF),
}


def config_from_json(config: dict[str, Any], where: str = "config.json") -> CLIPConfig:
    """-> CLIPConfig. Defaults are those of the public config classes."""
    kind = only(config, "model_type", tuple(FAMILIES), where=where)
    family, siglip = FAMILIES[kind], kind == "siglip"
    # Old configs have the same keys once more, which count.
    part = lambda name: table(config, name, {}, where) | (config.get(f"{name}_dict") or {})
    vision_config, text_config = part("vision_config"), part("text_config")
    vision = _vision(vision_config, family, siglip, f"{where} vision_config")
    text = _text(text_config, family, siglip, f"{where} text_config")
    if siglip:
        width = count(text_config, "projection_size", None, f"{where} text_config") or text.width
    else:
        width = count(config, "projection_dim", 512, where)
    made = CLIPConfig(
        vision=vision,
        text=text,
        projection_width=width,
        loss="sigmoid" if siglip else "softmax",
        vision_projection="none" if siglip else "linear",
        text_projection="bias" if siglip else "linear",
        resize="squash" if siglip else "shortest",
        family=kind,
        scalar_scale=not siglip,
    )
    made.check()
    return made


def _layers(config, default, family, where):
    """What both towers' configs say of their layers."""
    values = {
        "width": count(config, "hidden_size", default.hidden_size, where),
        "num_layers": count(config, "num_hidden_layers", default.num_hidden_layers, where),
        "num_heads": count(config, "num_attention_heads", default.num_attention_heads, where),
        "mlp_width": count(config, "intermediate_size", default.intermediate_size, where),
        "norm_eps": number(config, "layer_norm_eps", family.norm_eps, where),
        "activation": ACTIVATIONS[only(config, "hidden_act", tuple(ACTIVATIONS), family.activation, where)],
    }
    if values["width"] % values["num_heads"]:
        raise UserError(f"{where}: {values['num_heads']} heads do not divide hidden_size={values['width']}")
    return values


def _vision(config, family, siglip, where):
    only(config, "num_channels", (3,), 3, where)
    if siglip and not flag(config, "vision_use_head", True, where):
        raise UserError(
            f"{where}: vision_use_head=False leaves images without a vector; only towers with a head are read"
        )
    return ViTConfig(
        image_size=count(config, "image_size", 224, where),
        patch_size=count(config, "patch_size", family.patch_size, where),
        patch_bias=siglip,
        layer_scale=False,
        pre_norm=not siglip,
        post_norm=True,
        norm_tokens=siglip,
        pooling="map" if siglip else "class",
        class_token=not siglip,
        image_mean=family.image_mean,
        image_std=family.image_std,
        **_layers(config, family.vision, family, where),
    )


def _text(config, family, siglip, where):
    vocab_size = count(config, "vocab_size", family.vocab_size, where)
    end_id = count(config, "eos_token_id", 49407, where, minimum=0)
    highest = end_id == HIGHEST and not siglip
    return TextTowerConfig(
        vocab_size=vocab_size,
        context=count(config, "max_position_embeddings", family.context, where),
        end_id=vocab_size - 1 if highest else end_id,
        causal=not siglip,
        pooling="last" if siglip else "highest" if highest else "end",
        pad_id=count(config, "pad_token_id", 1, where, minimum=0) if config.get("pad_token_id", 1) is not None else -1,
        **_layers(config, family.text, family, where),
    )


def with_preprocessor(config: CLIPConfig, path: pathlib.Path) -> CLIPConfig:
    """The config with what a preprocessor_config.json says of the pixels, where there is one: how an image is resized,
    mean and deviation.

    Raises:
      UserError: it resizes to another size than the tower's, or in a way that is not known.
    """
    if not path.is_file():
        return config
    found, v, where = read_object(path), config.vision, str(path)
    mean, std = colours(found, "image_mean", v.image_mean, where), colours(found, "image_std", v.image_std, where)
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(v, image_mean=mean, image_std=std),
        resize=_resize(found, config, where),
        interpolation=RESAMPLE[only(found, "resample", tuple(RESAMPLE), 3, where)],
    )


def _resize(found, config, where):
    """Of RESIZE_MODES, by 'size': {'shortest_edge'} or a number, or {'height', 'width'}."""
    size, side = found.get("size"), config.vision.image_size
    if size is None or not flag(found, "do_resize", True, where):
        return config.resize
    given = size if isinstance(size, dict) else {"shortest_edge": size}
    if set(given.values()) != {side} or not set(given) <= {"shortest_edge", "height", "width"}:
        raise UserError(f"{where}: size={size!r} is not supported; images are resized to the tower's {side} pixels")
    return "shortest" if "shortest_edge" in given else "squash"


def preprocessor_to_json(config: CLIPConfig) -> dict[str, Any]:
    """A preprocessor_config.json.

    Raises:
      UserError: images are padded, which these processors do not do.
    """
    v, siglip = config.vision, config.family == "siglip"
    if config.resize == "longest":
        raise UserError("clip.resize='longest' has no form in Hugging Face's layout; export as open_clip")
    square = {"height": v.image_size, "width": v.image_size}
    made = {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": v.image_size}}
    return {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_resize": True,
        "resample": next(number for number, name in RESAMPLE.items() if name == config.interpolation),
        **(made if config.resize == "shortest" else {"do_center_crop": False, "size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(v.image_mean),
        "image_std": list(v.image_std),
    }


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """The public config.json; the inverse of `config_from_json`.

    Raises:
      UserError: options that the public code does not have.
    """
    v, t, siglip = config.vision, config.text, config.has_bias
    _check_known(config, siglip)
    assert isinstance(v, ViTConfig)
    kind = "siglip" if siglip else "clip"
    eos = HIGHEST if t.pooling == "highest" else t.end_id
    width = {"projection_size" if siglip else "projection_dim": config.projection_width}
    return {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        **({} if siglip else width),
        "logit_scale_init_value": config.logit_scale_init,
        "text_config": {
            "model_type": f"{kind}_text_model",
            **width,
            **_layers_to_json(t),
            "vocab_size": t.vocab_size,
            "max_position_embeddings": t.context,
            "eos_token_id": eos,
            "pad_token_id": t.padding_id,
        },
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            **({"vision_use_head": True} if siglip else width),
            **_layers_to_json(v),
            "num_channels": 3,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
        },
    }


def _layers_to_json(c):
    names = {ours: public for public, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": names[c.activation],
    }


def _check_known(config, siglip):
    """Raises UserError for what neither CLIPModel nor SiglipModel has."""
    v, t = config.vision, config.text
    remedy = "; export it with --as open_clip"
    if isinstance(v, ResNetConfig):
        raise UserError(f"a ResNet has no place in Hugging Face's layout of CLIP{remedy}")
    if not siglip and t.pooling == "end" and t.end_id == HIGHEST:
        raise UserError(f"clip.text.end_id=2 means in Hugging Face's CLIP that a text ends at its highest id{remedy}")
    wanted = {
        "vision.pooling": (v.pooling, "map" if siglip else "class"),
        "vision.class_token": (v.class_token, not siglip),
        "vision.pre_norm": (v.pre_norm, not siglip),
        "vision.patch_bias": (v.patch_bias, siglip),
        "vision.norm": (v.norm, "layer_norm"),
        "vision.qkv_bias": (v.qkv_bias, True),
        "vision.qk_norm": (v.qk_norm, False),
        "vision.layer_scale": (v.layer_scale, False),
        "text.layer_scale": (t.layer_scale, False),
        "text.causal": (t.causal, not siglip),
        "vision_projection": (config.vision_projection, "none" if siglip else "linear"),
        "text_projection": (config.text_projection, "bias" if siglip else "linear"),
    }
    if siglip:  # whose norm is of all tokens; for CLIP's one token it is the same
        wanted |= {"vision.norm_tokens": (v.norm_tokens, True), "text.pooling": (t.pooling, "last")}
    elif t.pooling not in ("end", "highest"):
        raise UserError(f"clip.text.pooling={t.pooling!r} is not in Hugging Face's layout of CLIP{remedy}")
    for name, (value, needed) in wanted.items():
        if value != needed:
            kind = "SigLIP" if siglip else "CLIP"
            raise UserError(
                f"clip.{name}={value!r} is not in Hugging Face's layout of {kind}, which has {needed!r}{remedy}"
            )


def layer_rules(num_layers: int) -> list[Rule]:
    """The rules of `EncoderLayer`s; their tensors start with 'encoder.layers.N.'."""
    linears = {f"self_attn.{short}_proj": ours for short, ours in zip("qkv", ("query", "key", "value"), strict=True)}
    linears |= {"self_attn.out_proj": "output", "mlp.fc1": "up", "mlp.fc2": "down"}
    entries = [entry for public, ours in linears.items() for entry in linear(public, ours)]
    entries += [entry for i in (1, 2) for entry in norm(f"layer_norm{i}", f"norm{i}")]
    layers = [rule(*entry, num_layers=num_layers) for entry in entries]
    return nested(layers, public="encoder.layers.{layer}.", ours="layers")


def linear(public: str, ours: str) -> list[tuple]:
    """A linear layer with a bias: arguments of `rule`."""
    return [(f"{public}.weight", f"{ours}/kernel", LINEAR), (f"{public}.bias", f"{ours}/bias", SAME)]


def norm(public: str, ours: str) -> list[tuple]:
    """A `LayerNorm`: arguments of `rule`."""
    return [(f"{public}.weight", f"{ours}/norm/scale", SAME), (f"{public}.bias", f"{ours}/norm/bias", SAME)]


def vision_rules(c: ViTConfig) -> list[Rule]:
    """The rules of `VisionTransformer`; its tensors start with 'vision_model.'."""
    entries = [("embeddings.patch_embedding.weight", "patch_embedding/kernel", patch_kernel(c.patch_size))]
    positions = "embeddings.position_embedding.weight"
    if c.class_token:
        entries += [
            ("embeddings.class_embedding", "class_embedding", ROW),
            (positions, "class_position position_embedding", POSITION_ROWS),
        ]
    else:
        entries += [(positions, "position_embedding", SAME)]
    if c.patch_bias:
        entries += [("embeddings.patch_embedding.bias", "patch_embedding/bias", SAME)]
    if c.pre_norm:
        entries += norm("pre_layrnorm", "pre_norm")
    entries += norm("post_layernorm", "post_norm")
    if c.pooling == "map":
        entries += [
            ("head.probe", "head/probe", CLASS_TOKEN),
            ("head.attention.in_proj_weight", "head/query/kernel head/key/kernel head/value/kernel", STACKED_QKV),
            ("head.attention.in_proj_bias", "head/query/bias head/key/bias head/value/bias", STACKED_BIAS),
            *linear("head.attention.out_proj", "head/output"),
            *norm("head.layernorm", "head/norm"),
            *linear("head.mlp.fc1", "head/up"),
            *linear("head.mlp.fc2", "head/down"),
        ]
    return [*(rule(*entry) for entry in entries), *layer_rules(c.num_layers)]


def text_rules(c: TextTowerConfig) -> list[Rule]:
    """The rules of `TextTower`; its tensors start with 'text_model.'."""
    entries = [
        ("embeddings.token_embedding.weight", "token_embedding/embedding", SAME),
        ("embeddings.position_embedding.weight", "position_embedding", SAME),
        *norm("final_layer_norm", "final_norm"),
    ]
    return [*(rule(*entry) for entry in entries), *layer_rules(c.num_layers)]


def rules(config: CLIPConfig) -> list[Rule]:
    """The rules of `CLIP`."""
    assert isinstance(config.vision, ViTConfig)
    entries = [("logit_scale", "log_scale", SAME if config.scalar_scale else SCALAR)]
    if config.has_bias:
        entries += [("logit_bias", "logit_bias", SAME if config.scalar_scale else SCALAR)]
    if config.vision_projection == "linear":
        entries += [("visual_projection.weight", "vision_projection/kernel", LINEAR)]
    if config.text_projection == "linear":
        entries += [("text_projection.weight", "text_projection/kernel", LINEAR)]
    elif config.text_projection == "bias":
        entries += linear("text_model.head", "text_projection")
    return [
        *(rule(*entry) for entry in entries),
        *nested(vision_rules(config.vision), public="vision_model.", ours="vision"),
        *nested(text_rules(config.text), public="text_model.", ours="text"),
    ]
