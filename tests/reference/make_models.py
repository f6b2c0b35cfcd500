"""Makes the HoVLE, InternVL2 and InternViT fixtures in tests/golden: tiny random checkpoints and what models.py gives.

    pip install -e ".[reference]" && python tests/reference/make_models.py
    python tests/reference/make_models.py --check FOLDER ...

With --check nothing is written: the arrays of checkpoints that others made are computed again from their inputs, which
shows that the oracle is right. InternLM2, Llama and Qwen checkpoints can be checked as well.
"""

import pathlib
import re
import sys

import numpy as np
import torch
from common import randomize, write
from models import build, greedy, open_folder, outputs

TOLERANCE = 2e-5
LAYERS = dict(
    hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    hidden_act="silu", max_position_embeddings=256,
)  # fmt: skip
# What the embedding and the LLM have in common by habit differs here, so that none can be taken for the other's.
LLM = LAYERS | dict(model_type="internlm2", vocab_size=50, rms_norm_eps=1e-5, rope_theta=10000.0)
EMBEDDING = LAYERS | dict(
    rms_norm_eps=1e-3, rope_theta=500.0, num_channels=3, image_size=16, patch_size=4, llm_vocab_size=50,
    llm_hidden_size=24, img_context_token_id=49, use_pixel_shuffle_proj=True, pixel_shuffle_loc="pre",
    downsample_ratio=0.5, special_token_maps={},
)  # fmt: skip
VISION = dict(
    model_type="intern_vit_6b", hidden_size=18, num_hidden_layers=2, num_attention_heads=3, intermediate_size=22,
    image_size=24, patch_size=4, num_channels=3, hidden_act="gelu", layer_norm_eps=1e-3,
)  # fmt: skip
CHAT = dict(model_type="internvl_chat", downsample_ratio=0.5, ps_version="v2", select_layer=-1)


def hovle(embedding=None, llm=None, tile=16, **options):
    config = CHAT | dict(embedding_config=EMBEDDING | (embedding or {}), llm_config=LLM | (llm or {}))
    return config | dict(force_image_size=tile) | options


HOVLE = {  # name: (config.json, tiles of each image)
    "hovle-plain-positions": (
        hovle(dict(num_attention_heads=2, num_key_value_heads=2), dict(bias=False), tile=24),
        (1, 1),
    ),
    "hovle-hd-normalized": (
        hovle(
            dict(image_size=12, patch_size=3, pixel_shuffle_loc="post", num_key_value_heads=1),
            dict(num_attention_heads=2, num_key_value_heads=1, bias=True),
            tile=12,
            normalize_encoder_output=True,
        ),
        (1, 3, 1),
    ),
    "hovle-special": (
        hovle(
            dict(
                use_pixel_shuffle_proj=False,
                image_size=12,
                num_key_value_heads=4,
                special_token_maps={"<img>": 50, "</img>": 51, "<quad>": 52},
            ),
            dict(vocab_size=53, bias=False),
            tile=12,
        ),
        (2, 1),
    ),
    "hovle-over-llama": (
        hovle(
            dict(
                layer_type="llama",
                attention_bias=True,
                mlp_bias=True,
                head_dim=8,
                img_context_token_id=52,
                special_token_maps={"<img>": 50, "</img>": 51, "<IMG_CONTEXT>": 52},
            ),
            dict(
                model_type="llama",
                tie_word_embeddings=True,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        ),
        (2, 1),
    ),
    "hovle-over-qwen3": (
        hovle(
            dict(layer_type="qwen3", head_dim=6, attention_bias=False, pixel_shuffle_loc="post"),
            dict(model_type="qwen3", head_dim=8, attention_bias=True, tie_word_embeddings=False),
        ),
        (1, 1),
    ),
}
INTERNVL = {
    "internvl2-over-qwen2": CHAT
    | dict(
        vision_config=VISION | dict(norm_type="rms_norm", qkv_bias=False, qk_normalization=True),
        llm_config=LLM | dict(model_type="qwen2", use_sliding_window=False, tie_word_embeddings=False),
        force_image_size=24,
    ),
}
TOWERS = {  # name: (config.json, tile side)
    "internvit-mixed": (VISION | dict(norm_type="layer_norm", qkv_bias=False, qk_normalization=True), 20),
}
# Of the gradients all vectors are kept, and of the matrices some of each sort.
KEPT_GRADIENTS = re.compile(
    r"patch_embedding|position_embedding|text_embeddings|embed_tokens|pixel_shuffle_proj\.2|mlp1\.3|"
    r"(layers|encoder)\.0\.(attention|self_attn|attn)|(layers|encoder)\.1\.(feed_forward\.w2|mlp\.(down_proj|fc2))"
)


def pixels(count, side, generator):
    return torch.randn(count, 3, side, side, generator=generator)


def hovle_inputs(config, tiles, generator):
    """-> (inputs, labels) of one prompt: text, then images, each followed by text; HD's long stream has its own ids.

    Args:
      tiles: of each image.
    """
    embedding, side = config["embedding_config"], config["force_image_size"]
    context, specials = embedding["img_context_token_id"], list(embedding["special_token_maps"].values())
    patches = (side // embedding["patch_size"]) ** 2
    shuffled = embedding["use_pixel_shuffle_proj"]

    def text(length):
        return torch.randint(3, 48, (length,), generator=generator).tolist()

    first, *between = text(4), *(text(3) for _ in tiles)
    last = text(3) + [x for x in specials[2:] if x != context] + text(5)

    def stream(tokens_per_tile):
        ids = list(first)
        for count, after in zip(tiles, between, strict=True):
            ids += [*specials[:1], *[context] * count * tokens_per_tile, *specials[1:2], *after]
        return torch.tensor([ids + last])

    inputs = {
        "pixel_values": pixels(sum(tiles), side, generator),
        "input_ids": stream(patches // 4 if shuffled else patches),
    }
    if shuffled and embedding["pixel_shuffle_loc"] == "post":
        inputs["hd_input_ids"] = stream(patches)
    labels = inputs["input_ids"].clone()
    labels[(labels == context) | (labels >= config["llm_config"]["vocab_size"])] = -100
    labels[:, : len(first)] = -100
    return inputs, labels


def internvl_inputs(config, generator):
    """-> (inputs, labels) of two prompts with a tile each; the second is shorter."""
    side, context = config["force_image_size"], config["llm_config"]["vocab_size"] - 1
    ids = torch.randint(3, context, (2, 24), generator=generator)
    ids[0, 4:13] = ids[1, 2:11] = context
    mask = torch.ones_like(ids)
    mask[1, 19:] = 0
    inputs = {
        "pixel_values": pixels(2, side, generator),
        "input_ids": ids,
        "attention_mask": mask,
        "img_context_token_id": torch.tensor(context),
    }
    return inputs, ids.masked_fill((mask == 0) | (ids == context), -100)


def make(name, config, inputs, labels=None, new_tokens=0):
    model = build(config)
    randomize(model)
    found = outputs(model, inputs, labels)
    arrays = inputs | {key: x for key, x in found.items() if not key.startswith("grad.") or keep(key, x)}
    if labels is not None:
        arrays["labels"] = labels
    if new_tokens:
        arrays["greedy_tokens"], margin = greedy(model, inputs, new_tokens)
        assert margin > 1e-3, f"{name}: rounding could decide a token (margin {margin:.1e})"
    write(name, config, model.public_tensors(), arrays)


def keep(name, gradient):
    return gradient.ndim == 1 or bool(KEPT_GRADIENTS.search(name))


def main():
    for name, (config, tiles) in HOVLE.items():
        make(name, config, *hovle_inputs(config, tiles, torch.Generator().manual_seed(1)), new_tokens=10)
    for name, config in INTERNVL.items():
        make(name, config, *internvl_inputs(config, torch.Generator().manual_seed(1)))
    for name, (config, side) in TOWERS.items():
        make(name, config, {"pixel_values": pixels(2, side, torch.Generator().manual_seed(1))})


# ---------------------------------------------------------------------------------------------------------------------
# Checking.

INPUTS = ("pixel_values", "input_ids", "hd_input_ids", "attention_mask", "img_context_token_id")
ALIASES = {  # older names of two gradients
    "grad_tok_embeddings": "grad.model.tok_embeddings.weight",
    "grad_wqkv0": "grad.model.layers.0.attention.wqkv.weight",
}


def check(folder):
    """Prints the largest error of every array of a folder. -> whether all that can be computed are right."""
    with np.load(folder / "expected.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    model, inputs = open_folder(folder), {name: arrays.pop(name) for name in INPUTS if name in arrays}
    mask = inputs.get("attention_mask")
    found = outputs(model, inputs, arrays.pop("labels", None))
    if "greedy_tokens" in arrays:
        found["greedy_tokens"], _ = greedy(model, inputs, len(arrays["greedy_tokens"]))
    if "greedy_sequence" in arrays:
        prompt = arrays.pop("greedy_prompt")
        new, _ = greedy(model, {"input_ids": prompt}, arrays["greedy_sequence"].shape[1] - prompt.shape[1])
        found["greedy_sequence"] = torch.cat([prompt, new[None]], dim=1)
    print(f"{folder}: {type(model).__name__}")
    right = True
    for name, expected in arrays.items():
        ours = found.get(ALIASES.get(name, name))
        if ours is None:
            print(f"  {name}: not computed")
            continue
        error = (ours.detach() - expected).abs()
        if mask is not None and error.shape[:2] == mask.shape:
            error = error[mask > 0]  # after the text nothing is defined
        print(f"  {name}: {float(error.max()):.1e}")
        right &= bool(error.max() <= TOLERANCE)
    return right


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        results = {folder: check(pathlib.Path(folder)) for folder in sys.argv[2:]}
        wrong = [folder for folder, right in results.items() if not right]
        sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)
    main()
