"""What the makers of fixtures share: random parameters, two ways of naming tensors, and how a folder is written."""

import dataclasses
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def randomize(model, seed=0):
    """Every parameter random, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)


@dataclasses.dataclass(frozen=True)
class Names:
    """Between the names of a part of a PyTorch model and the public ones; gradients go the same ways.

    Attributes:
      prefix, public_prefix: what all names of the part begin with.
      parts: {part of a name: its public form}, no part within another one's result.
      packed: (name with {} for q, k, v; the public name), where the three projections are stored as one.
      sizes: rows of query, key and value in a group of the packed tensor; its rows are whole groups.
    """

    prefix: str = ""
    public_prefix: str = ""
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    packed: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def to_public(self, tensors):
        found = {}
        for name, tensor in tensors.items():
            if self.packed and any(self.packed[0].format(x) in name for x in "kv"):
                continue
            if self.packed and self.packed[0].format("q") in name:
                q, public = self.packed[0].format("q"), self.packed[1]
                tensor = self._join([tensors[name.replace(q, self.packed[0].format(x))] for x in "qkv"])
                name = name.replace(q, public)
            name = name.removeprefix(self.prefix)
            for part, public in self.parts.items():
                name = name.replace(part, public)
            found[self.public_prefix + name] = tensor
        return found

    def from_public(self, tensors):
        found = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(self.public_prefix)
            for part, public in self.parts.items():
                name = name.replace(public, part)
            name = self.prefix + name
            if self.packed and self.packed[1] in name:
                pieces = torch.split(tensor.unflatten(0, (-1, sum(self.sizes))), self.sizes, dim=1)
                for x, piece in zip("qkv", pieces, strict=True):
                    found[name.replace(self.packed[1], self.packed[0].format(x))] = piece.flatten(0, 1)
            else:
                found[name] = tensor
        return found

    def _join(self, tensors):
        pieces = [x.unflatten(0, (-1, size)) for x, size in zip(tensors, self.sizes, strict=True)]
        return torch.cat(pieces, dim=1).flatten(0, 1)


def llm_names(config, prefix="", public_prefix=""):
    """Names of an LLM, or of its layers; `config` is the public one. Llama's and Qwen's are transformers' own."""
    if config.get("model_type", "internlm2") != "internlm2":
        return Names(prefix, public_prefix)
    heads = config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config["hidden_size"] // heads
    parts = {
        "model.embed_tokens.": "model.tok_embeddings.",
        "lm_head.": "output.",
        ".self_attn.o_proj.": ".attention.wo.",
        ".mlp.gate_proj.": ".feed_forward.w1.",
        ".mlp.up_proj.": ".feed_forward.w3.",
        ".mlp.down_proj.": ".feed_forward.w2.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
    }
    sizes = (heads // kv_heads * head_dim, head_dim, head_dim)
    return Names(prefix, public_prefix, parts, ("self_attn.{}_proj", "attention.wqkv"), sizes)


def write(name, config, tensors, arrays):
    """Writes GOLDEN/name: config.json, model.safetensors, expected.npz."""
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({key: x.detach().contiguous() for key, x in tensors.items()}, folder / "model.safetensors")
    np.savez(folder / "expected.npz", **{key: x.detach().numpy() for key, x in arrays.items()})
    print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")
