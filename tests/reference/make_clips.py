"""Makes the CLIP fixtures in tests/golden: tiny random checkpoints and what `transformers` and `open_clip` compute.

    pip install -e ".[reference]" open_clip_torch && python tests/reference/make_clips.py

Options that the public configs have: other end tokens, biases, ways of pooling, norms and scales.
"""

import json

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from common import GOLDEN
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

# Two towers of other widths, whose heads are of other sizes.
TEXT = dict(vocab_size=31, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=36)
VISION = dict(hidden_size=20, num_attention_heads=5, num_hidden_layers=2, intermediate_size=28)
TEXT |= dict(max_position_embeddings=9, pad_token_id=0)
VISION |= dict(patch_size=6, image_size=18)


def hugging_face(text=(), vision=(), **top):
    return {"text_config": TEXT | dict(text), "vision_config": VISION | dict(vision)} | top


HUGGING_FACE = {
    "clip-hf-options": hugging_face(
        {"eos_token_id": 17, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, projection_dim=14
    ),
    "clip-hf-highest": hugging_face({"eos_token_id": 2, "bos_token_id": 0}, {"hidden_act": "gelu"}, projection_dim=10),
    "siglip-hf-options": hugging_face(
        {"projection_size": 20, "hidden_act": "gelu"}, {"layer_norm_eps": 1e-4, "hidden_act": "quick_gelu"}
    ),
}
OPEN_TEXT = dict(context_length=9, vocab_size=31, width=24, heads=3, layers=2)
OPEN_CLIP = {
    "clip-open-options": dict(
        embed_dim=14,
        vision_cfg=dict(
            image_size=18, patch_size=6, width=20, head_width=10, layers=2, mlp_ratio=1.5, no_ln_pre=True,
            pool_type="avg", final_ln_after_pool=True, ls_init_value=0.2, norm_kwargs={"eps": 1e-4},
        ),
        text_cfg=OPEN_TEXT | dict(
            pool_type="last", no_causal_mask=True, proj_bias=True, ls_init_value=0.1, mlp_ratio=1.3,
            act_kwargs={"approximate": "tanh"},
        ),
        init_logit_scale=2.0,
    ),
    "clip-open-custom": dict(
        embed_dim=24,
        quick_gelu=True,
        custom_text=True,
        nonscalar_logit_scale=True,
        init_logit_scale=1.5,
        init_logit_bias=-3.0,
        vision_cfg=dict(image_size=18, patch_size=6, width=20, head_width=4, layers=1, pool_type="avg"),
        text_cfg=OPEN_TEXT | dict(pool_type="eos", eos_id=17, proj_type="none"),
    ),
    "clip-open-resnet-options": dict(
        embed_dim=12,
        vision_cfg=dict(image_size=96, layers=[2, 1, 1, 2], width=2, head_width=16),
        text_cfg=OPEN_TEXT | dict(pool_type="first", pad_id=3),
    ),
}  # fmt: skip


def randomize(model):
    """Every parameter and statistic random, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            if "logit_" not in name:
                parameter.copy_(
                    1 + 0.2 * noise
                    if is_norm
                    else noise * (0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
                )
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            if name.endswith("num_batches_tracked"):
                buffer.fill_(1234567)


def inputs(image_size, end_id, length=9):
    generator = torch.Generator().manual_seed(1)
    ends = (8, 5, 3, 6)[: 2 if image_size > 64 else 4]
    pixels = torch.randn((len(ends), 3, image_size, image_size), generator=generator)
    tokens = torch.randint(3, 17, (len(ends), length), generator=generator)
    mask = torch.ones_like(tokens)
    for row, end in enumerate(ends):
        tokens[row, end:] = 0
        tokens[row, end] = end_id
        mask[row, end + 1 :] = 0
    return pixels, tokens, mask


def pairs_loss(logits, is_sigmoid):
    if is_sigmoid:
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum(1).mean()
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def of_hugging_face(model, pixels, tokens, mask, is_siglip):
    """-> the arrays of expected.npz, without gradients."""
    vision = model.vision_model(pixel_values=pixels, output_hidden_states=True)
    text = model.text_model(input_ids=tokens)
    out = model(input_ids=tokens, pixel_values=pixels)
    arrays = {
        "vision_last_hidden_state": vision.last_hidden_state,
        "vision_hidden_0": vision.hidden_states[0],
        "vision_hidden_1": vision.hidden_states[1],
        "text_last_hidden_state": text.last_hidden_state,
        "image_pooled": vision.pooler_output,
        "text_pooled": text.pooler_output,
        "image_embeds": out.image_embeds,
        "text_embeds": out.text_embeds,
        "logits_per_image": out.logits_per_image,
        "logits_per_text": out.logits_per_text,
    }
    if not is_siglip:
        masked = model(input_ids=tokens, pixel_values=pixels, attention_mask=mask)
        arrays |= {"attention_mask": mask, "text_embeds_masked": masked.text_embeds}
        arrays |= {"logits_per_image_masked": masked.logits_per_image}
    return arrays, pairs_loss(out.logits_per_image, is_siglip)


def of_open_clip(model, pixels, tokens):
    """-> the arrays of expected.npz, without gradients."""
    images, texts = model.encode_image(pixels), model.encode_text(tokens)
    unit = lambda x: F.normalize(x, dim=-1)
    scale, bias = model.logit_scale, model.logit_bias
    logits = scale.exp() * unit(images) @ unit(texts).T + (0 if bias is None else bias)
    arrays = {
        "image_proj": images,
        "text_proj": texts,
        "image_embeds": unit(images),
        "text_embeds": unit(texts),
        "logit_scale": scale,
        "logits_per_image": logits,
        "logits_per_text": logits.T,
    }
    return arrays | ({} if bias is None else {"logit_bias": bias}), pairs_loss(logits, bias is not None)


def write(name, model, config_file, config, stem, given, arrays, loss):
    loss.backward()
    gradients = {f"grad.{key}": x.grad for key, x in model.named_parameters() if x.grad is not None}
    vectors = {key: x for key, x in gradients.items() if x.numel() < 400}
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_file).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: x.detach().contiguous() for k, x in model.state_dict().items() if not k.endswith("position_ids")}
    save_file(tensors, folder / f"{stem}.safetensors")
    arrays = given | arrays | {"loss": loss} | vectors
    np.savez_compressed(folder / "expected.npz", **{key: x.detach().numpy() for key, x in arrays.items()})
    print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


def main():
    torch.manual_seed(0)
    for name, options in HUGGING_FACE.items():
        is_siglip = name.startswith("siglip")
        config = (SiglipConfig if is_siglip else CLIPConfig)(**options, attn_implementation="eager")
        model = (SiglipModel if is_siglip else CLIPModel)(config).float().eval()
        randomize(model)
        pixels, tokens, mask = inputs(18, 30 if options["text_config"].get("eos_token_id") == 2 else 17)
        arrays, loss = of_hugging_face(model, pixels, tokens, mask, is_siglip)
        public = {"model_type": "siglip" if is_siglip else "clip"} | options
        write(name, model, "config.json", public, "model", dict(pixel_values=pixels, input_ids=tokens), arrays, loss)
    for name, options in OPEN_CLIP.items():
        options = json.loads(json.dumps(options))
        stored = json.loads(json.dumps(options))
        is_custom = options.pop("custom_text", False)
        model = (open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**options).float().eval()
        randomize(model)
        pixels, tokens, _ = inputs(options["vision_cfg"]["image_size"], 17)
        arrays, loss = of_open_clip(model, pixels, tokens)
        config = {"model_cfg": stored, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}}
        given = dict(pixel_values=pixels, input_ids=tokens)
        write(name, model, "open_clip_config.json", config, "open_clip_model", given, arrays, loss)


if __name__ == "__main__":
    main()
