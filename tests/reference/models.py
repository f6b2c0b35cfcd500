"""An independent oracle of the public formats in PyTorch, put together from what `transformers` has.

`open_folder` gives the model of a checkpoint; a model called with a prompt gives the arrays of `expected.npz` that are
outputs, and has its parameters and gradients under the public names. float32, eager attention.

Dimension letters: B batch, L tokens of a stream, M tiles, S tile side, P patches, D width, V vocabulary.
"""

import copy
import itertools
import json
import pathlib

import torch
import torch.nn.functional as F
from common import Names, llm_names
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, InternVLVisionConfig, InternVLVisionModel

VIT_PARTS = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "encoder.layer.": "encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.q_norm.": ".attn.q_norm.",
    ".attention.k_norm.": ".attn.k_norm.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
}


# ---------------------------------------------------------------------------------------------------------------------
# Parts.


def decoder_config(config):
    """The transformers config of a public one; InternLM2, which transformers lacks, is Llama with other names.

    A copy, as transformers writes into what it is given.
    """
    left_out = ("architectures", "auto_map", "img_context_token_id")
    config = copy.deepcopy({key: x for key, x in config.items() if key not in left_out})
    kind = config.pop("model_type", "internlm2")
    if kind == "internlm2":
        kind, config = "llama", config | {"attention_bias": config.get("bias", True)}
    return AutoConfig.for_model(kind, **config | {"attn_implementation": "eager"})


def decoder_layers(config):
    """The layers alone, as a model from input vectors to hidden states."""
    model = AutoModel.from_config(decoder_config(config))
    model.embed_tokens, model.norm = None, nn.Identity()
    return model


def tower(config):
    """An InternViT. Defaults are those of the public `InternVisionConfig`."""
    keys = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size".split()
    eps = config.get("layer_norm_eps", 1e-6)
    model = InternVLVisionModel(
        InternVLVisionConfig(
            **{key: config[key] for key in keys},
            norm_type=config.get("norm_type", "rms_norm"),
            layer_norm_eps=eps,
            attention_bias=config.get("qkv_bias", False),
            use_qk_norm=config.get("qk_normalization", True),
            attn_implementation="eager",
        )
    )
    for layer in model.encoder.layer:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            norm.variance_epsilon = eps  # the public code's; transformers' is fixed
    return model


def pixel_shuffle(x):
    """Each 2x2 block of a square grid becomes one token: [M, P, D] -> [M, P / 4, 4 D], blocks row-major."""
    side, width = int(x.shape[1] ** 0.5), x.shape[2]
    x = F.pixel_unshuffle(x.transpose(1, 2).unflatten(2, (side, side)), 2)  # channels (D, row, column)
    return x.unflatten(1, (width, 4)).permute(0, 3, 4, 2, 1).reshape(len(x), -1, 4 * width)


def put(x, where, rows):
    """x [B, L, D] with `rows` [K, D], in order, where `where` [B, L] is true."""
    x = x.clone()
    x[where] = rows
    return x


class VisionEmbeddings(nn.Module):
    """Patches with their positions; the class token and its position are stored and not used."""

    def __init__(self, config):
        super().__init__()
        width, patch_size = config["hidden_size"], config["patch_size"]
        self.side = config["image_size"] // patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))

    def forward(self, pixel_values):
        """[M, 3, S, S] -> [M, P, D]. To its own size a table is resized exactly."""
        x = self.patch_embedding(pixel_values)
        table = self.position_embedding[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        table = F.interpolate(table, size=x.shape[2:], mode="bicubic", align_corners=False)
        return (x + table).flatten(2).transpose(1, 2)


class HolisticEmbedding(nn.Module):
    """One sequence of patches and text through causal layers.

    HD (`pixel_shuffle_loc` 'post') has a long sequence for the layers, and what comes out of them is shortened.
    """

    def __init__(self, config):
        super().__init__()
        width, specials = config["hidden_size"], len(config.get("special_token_maps") or {})
        self.context = config["img_context_token_id"]
        self.loc = config["pixel_shuffle_loc"] if config["use_pixel_shuffle_proj"] else "none"
        self.vision_embeddings = VisionEmbeddings(config)
        self.llm_text_embeddings = nn.Embedding(config["llm_vocab_size"], width)
        if specials:
            self.special_text_embeddings = nn.Embedding(specials, width)
        if self.loc != "none":
            layers = nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width)
            self.pixel_shuffle_proj = nn.Sequential(*layers)
        family = {"model_type": config.get("layer_type", "internlm2"), "vocab_size": config["llm_vocab_size"]}
        self.encoder = decoder_layers({"bias": False} | config | family)

    def embed_text(self, ids):
        table = self.llm_text_embeddings.weight
        if hasattr(self, "special_text_embeddings"):
            table = torch.cat([table, self.special_text_embeddings.weight])
        return table[ids]

    def forward(self, input_ids, pixel_values, hd_input_ids=None):
        """ids [1, L], pixels [M, 3, S, S], HD: the long stream's ids -> ([1, L, D], {name: array on the way})."""
        ids = hd_input_ids if self.loc == "post" else input_ids
        patches = self.vision_embeddings(pixel_values)
        images = self.pixel_shuffle_proj(pixel_shuffle(patches)) if self.loc == "pre" else patches
        x = put(self.embed_text(ids), ids == self.context, images.flatten(0, 1))
        x = output = self.encoder(inputs_embeds=x).last_hidden_state
        features = output[ids == self.context]
        if self.loc == "post":
            features = self.pixel_shuffle_proj(pixel_shuffle(features.reshape(patches.shape))).flatten(0, 1)
            x = output.new_zeros(*input_ids.shape, output.shape[-1])
            x = put(x, input_ids != self.context, output[ids != self.context])
            x = put(x, input_ids == self.context, features)
        return x, {"embedding_output": output, "image_features": features, "vision_embeddings": patches}


# ---------------------------------------------------------------------------------------------------------------------
# Models.


class Model(nn.Module):
    """Base of the models: parameters and gradients under public names.

    Attributes:
      names: [Names] of its parts; a tensor belongs to the first whose prefix it has.
    """

    def public_tensors(self):
        return self._convert(dict(self.named_parameters()), "prefix", Names.to_public)

    def public_gradients(self):
        """Of every tensor that has one."""
        gradients = {name: x.grad for name, x in self.named_parameters() if x.grad is not None}
        return self._convert(gradients, "prefix", Names.to_public)

    def load(self, tensors):
        """Public tensors; a tied head is not among them."""
        found = self._convert(tensors, "public_prefix", Names.from_public)
        wrong = found.keys() ^ {name for name, _ in self.named_parameters()}
        if wrong:
            raise ValueError(f"missing or unknown: {sorted(wrong)}")
        self.load_state_dict(found, strict=False)

    def _convert(self, tensors, prefix, convert):
        left, found = dict(tensors), {}
        for names in self.names:
            own = {key: left.pop(key) for key in list(left) if key.startswith(getattr(names, prefix))}
            found |= convert(names, own)
        return found


class LanguageModel(Model):
    def __init__(self, config):
        super().__init__()
        self.llm = AutoModelForCausalLM.from_config(decoder_config(config))
        self.names = [llm_names(config, "llm.")]

    def forward(self, input_ids, attention_mask=None):
        out = self.llm(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        names = ("embeddings", "hidden_after_layer1", "hidden_final_normed")
        hidden = (out.hidden_states[i] for i in (0, 1, -1))
        return {"logits": out.logits} | dict(zip(names, hidden, strict=True))


class Tower(Model):
    def __init__(self, config):
        super().__init__()
        self.vision_model = tower(config)
        self.names = [vit_names(config, "vision_model.", "")]

    def forward(self, pixel_values):
        return {"last_hidden_state": self.vision_model(pixel_values).last_hidden_state}


class InternVL(Model):
    def __init__(self, config):
        super().__init__()
        vision, llm = config["vision_config"], config["llm_config"]
        wide, width = 4 * vision["hidden_size"], llm["hidden_size"]
        self.vision_model = tower(vision)
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
        self.language_model = AutoModelForCausalLM.from_config(decoder_config(llm))
        self.names = [
            vit_names(vision, "vision_model.", "vision_model."),
            llm_names(llm, "language_model.", "language_model."),
            Names(),
        ]

    def forward(self, input_ids, pixel_values, img_context_token_id, attention_mask=None):
        hidden = self.vision_model(pixel_values).last_hidden_state
        features = self.mlp1(pixel_shuffle(hidden[:, 1:]))
        x = self.language_model.get_input_embeddings()(input_ids)
        x = put(x, input_ids == img_context_token_id, features.flatten(0, 1))
        logits = self.language_model(inputs_embeds=x, attention_mask=attention_mask).logits
        return {"logits": logits, "vit_last_hidden_state": hidden, "projected_features": features}


class HoVLE(Model):
    def __init__(self, config):
        super().__init__()
        embedding, llm = config["embedding_config"], config["llm_config"]
        self.normalize = config.get("normalize_encoder_output", False)
        self.embedding_model = HolisticEmbedding(embedding)
        self.language_model = AutoModelForCausalLM.from_config(decoder_config(llm))
        layers = embedding | {"model_type": embedding.get("layer_type", "internlm2")}
        self.names = [
            llm_names(layers, "embedding_model.encoder.layers.", "embedding_model.encoder."),
            llm_names(llm, "language_model.", "language_model."),
            Names(),
        ]

    def forward(self, input_ids, pixel_values, hd_input_ids=None):
        x, found = self.embedding_model(input_ids, pixel_values, hd_input_ids)
        if self.normalize:
            x = F.normalize(x, dim=-1)
        return {"logits": self.language_model(inputs_embeds=x).logits} | found


def vit_names(config, prefix, public_prefix):
    packed = ("attention.{}_proj", "attn.qkv")
    return Names(prefix, public_prefix, VIT_PARTS, packed, 3 * (config["hidden_size"],))


def build(config):
    """The model of a public config.json, its parameters as PyTorch starts them."""
    kind = config["model_type"]
    if kind == "intern_vit_6b":
        return Tower(config)
    if kind == "internvl_chat":
        return (HoVLE if "embedding_config" in config else InternVL)(config)
    return LanguageModel(config)


def open_folder(folder):
    """The model of a checkpoint in Hugging Face layout."""
    folder = pathlib.Path(folder)
    model = build(json.loads((folder / "config.json").read_text()))
    model.load(dict(itertools.chain.from_iterable(load_file(file).items() for file in folder.glob("*.safetensors"))))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.


def outputs(model, inputs, labels=None):
    """-> {name: array}: what the model gives; with labels [B, L], -100 ignored, `loss` and `grad.<public name>` too."""
    if labels is None:
        with torch.no_grad():
            return model(**inputs)
    model.zero_grad()
    found = model(**inputs)
    loss = F.cross_entropy(found["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    gradients = {f"grad.{name}": x for name, x in model.public_gradients().items()}
    return found | {"loss": loss} | gradients


@torch.no_grad()
def greedy(model, inputs, steps):
    """`steps` tokens after a single prompt, each from a full forward.

    Returns:
      (tokens [steps], the smallest distance between a step's two largest logits).
    """
    inputs, tokens, margin = dict(inputs), [], float("inf")
    for _ in range(steps):
        largest, ids = model(**inputs)["logits"][0, -1].topk(2)
        tokens.append(ids[0])
        margin = min(margin, float(largest[0] - largest[1]))
        for name in {"input_ids", "hd_input_ids"} & inputs.keys():
            inputs[name] = torch.cat([inputs[name], ids[:1, None]], dim=1)
    return torch.stack(tokens), margin
