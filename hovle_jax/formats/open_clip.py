"""CLIP in open_clip's layout: open_clip_config.json and open_clip_model.safetensors, with a ViT or a ResNet tower.

The names are those of OpenAI's release. Projections are applied as x @ W, and are not transposed.
"""

import math
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.formats.fields import colours, count, flag, number, only, table
from hovle_jax.formats.hf_clip import linear, norm
from hovle_jax.formats.mapping import (
    CONVOLUTION,
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
from hovle_jax.model.clip_config import INTERPOLATIONS, RESIZE_MODES, CLIPConfig, ResNetConfig, TextTowerConfig
from hovle_jax.model.config import CLIP_MEAN, CLIP_STD, ViTConfig

CONFIG = "open_clip_config.json"
STEM = "open_clip_model"  # of the weights' file name
VISION_POOLINGS = {"tok": "class", "avg": "mean"}
TEXT_POOLINGS = {"argmax": "highest", "eos": "end", "last": "last", "first": "first"}
# Keys of options that change the model and are not read; each is off where it is absent, false, 0 or null.
OTHER_BLOCKS = (
    "block_type",
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)
OTHER_VISION = (*OTHER_BLOCKS, "timm_model_name", "attentional_pool")
OTHER_TEXT = (*OTHER_BLOCKS, "hf_model_name", "embed_cls", "use_pad_mask")


def config_from_json(config: dict[str, Any], where: str = CONFIG) -> CLIPConfig:
    """-> CLIPConfig. Defaults are those of open_clip's config classes."""
    model = table(config, "model_cfg", where=where)
    pixels = table(config, "preprocess_cfg", {}, where)
    _refuse(model, ("multimodal_cfg",), f"{where} model_cfg")
    quick = flag(model, "quick_gelu", False, where)
    vision_config, text_config = (
        table(model, f"{part}_cfg", where=f"{where} model_cfg") for part in ("vision", "text")
    )
    stats = {
        "image_mean": colours(pixels, "mean", CLIP_MEAN, f"{where} preprocess_cfg"),
        "image_std": colours(pixels, "std", CLIP_STD, f"{where} preprocess_cfg"),
    }
    text = _text(text_config, quick, f"{where} text_cfg")
    made = CLIPConfig(
        vision=_vision(vision_config, quick, stats, f"{where} vision_cfg"),
        text=text,
        projection_width=count(model, "embed_dim", where=f"{where} model_cfg"),
        loss="softmax" if model.get("init_logit_bias") is None else "sigmoid",
        text_projection=_text_projection(text_config, f"{where} text_cfg"),
        resize=only(pixels, "resize_mode", RESIZE_MODES, "shortest", f"{where} preprocess_cfg"),
        interpolation=only(pixels, "interpolation", INTERPOLATIONS, "bicubic", f"{where} preprocess_cfg"),
        family="open_clip_custom" if flag(model, "custom_text", False, where) else "open_clip",
        scalar_scale=not flag(model, "nonscalar_logit_scale", False, where),
    )
    made.check()
    return made


def _refuse(config, keys, where):
    for key in keys:
        if config.get(key) and not (key == "block_type" and config[key] == "default"):
            raise UserError(f"{where}: {key}={config[key]!r} is not supported: remove it if the weights do without")


def _activation(config, quick, where):
    """quick_gelu, GELU or, by `act_kwargs`, its tanh form."""
    options = config.get("act_kwargs") or {}
    form = only(options, "approximate", ("none", "tanh"), "none", f"{where} act_kwargs")
    return "quick_gelu" if quick else {"none": "gelu", "tanh": "gelu_tanh"}[form]


def _layers(config, quick, width, layers, where):
    """What both towers' configs say of their layers."""
    width = count(config, "width", width, where)
    return {
        "width": width,
        "num_layers": count(config, "layers", layers, where),
        "mlp_width": int(width * number(config, "mlp_ratio", 4.0, where)),
        "norm_eps": number(config.get("norm_kwargs") or {}, "eps", 1e-5, f"{where} norm_kwargs"),
        "activation": _activation(config, quick, where),
        "layer_scale": config.get("ls_init_value") is not None,
    }


def _side(config, key, default, where):
    """A size that may be given as [height, width], of which both must be equal."""
    value = config.get(key, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return count({key: value}, key, where=where)


def _vision(config, quick, stats, where):
    _refuse(config, OTHER_VISION, where)
    head_width = count(config, "head_width", 64, where)
    image_size = _side(config, "image_size", 224, where)
    layers = config.get("layers", 12)
    if isinstance(layers, list | tuple):
        if len(layers) != 4 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in layers):
            raise UserError(f"{where}: layers={layers!r} must be the blocks of four stages")
        width = count(config, "width", 64, where)
        heads = _heads(width * 32, head_width, where)
        return ResNetConfig(image_size=image_size, width=width, layers=tuple(layers), num_heads=heads, **stats)
    made = _layers(config, quick, 768, 12, where)
    return ViTConfig(
        image_size=image_size,
        patch_size=_side(config, "patch_size", 16, where),
        num_heads=_heads(made["width"], head_width, where),
        patch_bias=False,
        pre_norm=not flag(config, "no_ln_pre", False, where),
        post_norm=True,
        norm_tokens=not flag(config, "final_ln_after_pool", False, where),
        pooling=VISION_POOLINGS[only(config, "pool_type", tuple(VISION_POOLINGS), "tok", where)],
        **stats,
        **made,
    )


def _heads(width, head_width, where):
    if width % head_width:
        raise UserError(f"{where}: head_width={head_width} does not divide the width {width}")
    return width // head_width


def _text(config, quick, where):
    _refuse(config, OTHER_TEXT, where)
    vocab_size = count(config, "vocab_size", 49408, where)
    pooling = TEXT_POOLINGS[only(config, "pool_type", tuple(TEXT_POOLINGS), "argmax", where)]
    return TextTowerConfig(
        vocab_size=vocab_size,
        num_heads=count(config, "heads", 8, where),
        context=count(config, "context_length", 77, where),
        end_id=count(config, "eos_id", 2, where, minimum=0) if pooling == "end" else vocab_size - 1,
        causal=not flag(config, "no_causal_mask", False, where),
        pooling=pooling,
        pad_id=count(config, "pad_id", 0, where, minimum=0),
        **_layers(config, quick, 512, 12, where),
    )


def _text_projection(config, where):
    kind = only(config, "proj_type", ("linear", "none"), "linear", where)
    return "bias" if kind == "linear" and flag(config, "proj_bias", False, where) else kind


def config_to_json(config: CLIPConfig) -> dict[str, Any]:
    """The public open_clip_config.json; the inverse of `config_from_json`.

    Raises:
      UserError: options that open_clip does not have.
    """
    v, t = config.vision, config.text
    towers = [t] + ([v] if isinstance(v, ViTConfig) else [])
    quick = {tower.activation == "quick_gelu" for tower in towers}
    if len(quick) > 1:
        raise UserError("open_clip has quick_gelu in both towers or in none; export this model in another layout")
    model = {"embed_dim": config.projection_width, "quick_gelu": quick.pop()}
    if config.family == "open_clip_custom":
        model |= {"custom_text": True}
    if config.has_bias:
        model |= {"init_logit_bias": config.logit_bias_init}
    if not config.scalar_scale:
        model |= {"nonscalar_logit_scale": True}
    vision = _vision_to_json(v, config) if isinstance(v, ViTConfig) else _resnet_to_json(v)
    return {
        "model_cfg": model | {"vision_cfg": vision, "text_cfg": _text_to_json(t, config)},
        "preprocess_cfg": {
            "mean": list(v.image_mean),
            "std": list(v.image_std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize,
        },
    }


def _resnet_to_json(v):
    return {
        "image_size": v.image_size,
        "layers": list(v.layers),
        "width": v.width,
        "head_width": v.channels // v.num_heads,
    }


def _layers_to_json(c):
    made = {"width": c.width, "layers": c.num_layers, "mlp_ratio": _ratio(c.mlp_width, c.width)}
    if c.norm_eps != 1e-5:
        made |= {"norm_kwargs": {"eps": c.norm_eps}}
    if c.activation == "gelu_tanh":
        made |= {"act_kwargs": {"approximate": "tanh"}}
    if c.layer_scale:
        made |= {"ls_init_value": 0.1}
    return made


def _ratio(mlp_width, width):
    """A ratio from which int(width * ratio) gives the MLP's width again."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _vision_to_json(v, config):
    wanted = {
        "vision.class_token": (v.class_token, True),
        "vision.patch_bias": (v.patch_bias, False),
        "vision.norm": (v.norm, "layer_norm"),
        "vision.qkv_bias": (v.qkv_bias, True),
        "vision.qk_norm": (v.qk_norm, False),
        "vision_projection": (config.vision_projection, "linear"),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise UserError(f"clip.{name}={value!r} is not in open_clip's layout, which has {needed!r}")
    poolings = {ours: public for public, ours in VISION_POOLINGS.items()}
    if v.pooling not in poolings:
        raise UserError(
            f"clip.vision.pooling={v.pooling!r} is not in open_clip's own ViT; export with --as huggingface"
        )
    made = {"image_size": v.image_size, "patch_size": v.patch_size, "head_width": v.width // v.num_heads}
    made |= _layers_to_json(v)
    if not v.pre_norm:
        made |= {"no_ln_pre": True}
    if v.pooling != "class":  # of one token the order makes no difference
        made |= {"pool_type": poolings[v.pooling], "final_ln_after_pool": not v.norm_tokens}
    return made


def _text_to_json(t, config):
    made = {"context_length": t.context, "vocab_size": t.vocab_size, "heads": t.num_heads} | _layers_to_json(t)
    pooling = {ours: public for public, ours in TEXT_POOLINGS.items()}[t.pooling]
    if pooling != "argmax":
        made |= {"pool_type": pooling}
    if pooling == "eos":
        made |= {"eos_id": t.end_id}
    if t.padding_id:
        made |= {"pad_id": t.padding_id}
    if not t.causal:
        made |= {"no_causal_mask": True}
    if config.text_projection != "linear":
        made |= {"proj_bias": True} if config.text_projection == "bias" else {"proj_type": "none"}
    return made


def layer_rules(num_layers: int, layer_scale: bool) -> list[Rule]:
    """The rules of `EncoderLayer`s; their tensors start with 'transformer.resblocks.N.'."""
    entries = [
        ("attn.in_proj_weight", "query/kernel key/kernel value/kernel", STACKED_QKV),
        ("attn.in_proj_bias", "query/bias key/bias value/bias", STACKED_BIAS),
        *linear("attn.out_proj", "output"),
        *linear("mlp.c_fc", "up"),
        *linear("mlp.c_proj", "down"),
        *norm("ln_1", "norm1"),
        *norm("ln_2", "norm2"),
    ]
    if layer_scale:
        entries += [("ls_1.gamma", "scale1", SAME), ("ls_2.gamma", "scale2", SAME)]
    layers = [rule(*entry, num_layers=num_layers) for entry in entries]
    return nested(layers, public="transformer.resblocks.{layer}.", ours="layers")


def vision_rules(c: ViTConfig) -> list[Rule]:
    """The rules of `VisionTransformer`; its tensors start with 'visual.'."""
    entries = [
        ("class_embedding", "class_embedding", ROW),
        ("positional_embedding", "class_position position_embedding", POSITION_ROWS),
        ("conv1.weight", "patch_embedding/kernel", patch_kernel(c.patch_size)),
        *(norm("ln_pre", "pre_norm") if c.pre_norm else []),
        *norm("ln_post", "post_norm"),
    ]
    return [*(rule(*entry) for entry in entries), *layer_rules(c.num_layers, c.layer_scale)]


def resnet_rules(c: ResNetConfig) -> list[Rule]:
    """The rules of `ModifiedResNet`; its tensors start with 'visual.'."""
    entries = []
    for i in (1, 2, 3):
        entries += [(f"conv{i}.weight", f"conv{i}/kernel", CONVOLUTION), *_batch_norm(f"bn{i}", f"norm{i}")]
    for stage, blocks in enumerate(c.layers, start=1):
        for i in range(blocks):
            public, ours = f"layer{stage}.{i}.", f"stage{stage}_block{i}/"
            for n in (1, 2, 3):
                entries += [(f"{public}conv{n}.weight", f"{ours}conv{n}/kernel", CONVOLUTION)]
                entries += _batch_norm(f"{public}bn{n}", f"{ours}norm{n}")
            if not i:  # the first block of every stage changes the shape
                entries += [(f"{public}downsample.0.weight", f"{ours}projection/kernel", CONVOLUTION)]
                entries += _batch_norm(f"{public}downsample.1", f"{ours}projection_norm")
    entries += [("attnpool.positional_embedding", "pool/position_embedding", SAME)]
    for public, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("c", "output")):
        entries += linear(f"attnpool.{public}_proj", f"pool/{ours}")
    return [rule(*entry) for entry in entries]


def _batch_norm(public, ours):
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    names |= {"num_batches_tracked": "batches"}
    return [(f"{public}.{theirs}", f"{ours}/{name}", SAME) for theirs, name in names.items()]


def text_rules(config: CLIPConfig) -> list[Rule]:
    """The rules of the text tower and its projection; in a `custom_text` model they start with 'text.'."""
    c = config.text
    entries = [
        ("token_embedding.weight", "text/token_embedding/embedding", SAME),
        ("positional_embedding", "text/position_embedding", SAME),
        *norm("ln_final", "text/final_norm"),
    ]
    if config.text_projection == "linear":
        entries += [("text_projection", "text_projection/kernel", SAME)]
    elif config.text_projection == "bias":
        entries += linear("text_projection", "text_projection")
    return [*(rule(*entry) for entry in entries), *nested(layer_rules(c.num_layers, c.layer_scale), ours="text")]


def rules(config: CLIPConfig) -> list[Rule]:
    """The rules of `CLIP`."""
    v = config.vision
    scalar = SAME if config.scalar_scale else SCALAR
    entries = [("logit_scale", "log_scale", scalar)]
    entries += [("logit_bias", "logit_bias", scalar)] if config.has_bias else []
    entries += [("visual.proj", "vision_projection/kernel", SAME)] if isinstance(v, ViTConfig) else []
    vision = vision_rules(v) if isinstance(v, ViTConfig) else resnet_rules(v)
    prefix = "text." if config.family == "open_clip_custom" else ""
    text = text_rules(config)
    return [
        *(rule(*entry) for entry in entries),
        *nested(vision, public="visual.", ours="vision"),
        *(Rule(prefix + r.public, r.ours, r.transform, r.num_layers) for r in text),
    ]
