"""Seconds of a float32 training step on the CPU: this project's train_step against PyTorch.

    pip install -e ".[benchmark]" && python -m tests.benchmarks.cpu_step --sizes 2M,46M

The peer is a decoder of the same shapes in plain PyTorch: RMSNorm, rotary positions, the fused causal attention of
`scaled_dot_product_attention`, SwiGLU, cross-entropy, clipping by the global norm and the fused AdamW; eagerly, and
(where there is a C++ compiler) by `torch.compile`. All start from the same weights; after three steps on the same batch
the losses must agree, so that all compute the same update. Each side is a process of its own with as many threads as
there are cores; they take turns of a few steps. Both sides keep freed memory, as every command of this project does.
Prints one JSON object: for each size the median seconds of a step, and PyTorch's over ours.
"""

import dataclasses
import os
import shutil

import numpy as np

from hovle_jax.model.config import LLMConfig, StackConfig
from tests.benchmarks import alternating

# name -> (sizes, rows, tokens of a row)
SIZES = {
    "2M": (LLMConfig(StackConfig(6, 160, 5, 5, 32, 432), vocab_size=512), 32, 128),
    "46M": (LLMConfig(StackConfig(12, 512, 8, 8, 64, 1376), vocab_size=8192), 8, 256),
}
RATE, B1, B2, EPSILON, DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.05, 1.0


def weights(config: LLMConfig, seed=0):
    """{path: array}, kernels [layers, in, out]: what both sides start from."""
    s, rng = config.stack, np.random.default_rng(seed)
    width, heads, kv_heads = s.width, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    kernels = {
        "query": (width, heads), "key": (width, kv_heads), "value": (width, kv_heads), "output": (heads, width),
        "gate": (width, s.mlp_width), "up": (width, s.mlp_width), "down": (s.mlp_width, width),
    }  # fmt: skip
    shapes = {f"stack/layers/{name}/kernel": (s.num_layers, *shape) for name, shape in kernels.items()}
    shapes |= {"token_embedding/embedding": (config.vocab_size, width), "head/kernel": (width, config.vocab_size)}
    found = {name: rng.normal(0, shape[-2] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = {f"stack/layers/{name}/scale": (s.num_layers, width) for name in ("attention_norm", "ffn_norm")}
    return found | {name: np.ones(shape, np.float32) for name, shape in (norms | {"norm/scale": (width,)}).items()}


def token_batch(config: LLMConfig, rows, length, seed=1):
    """[rows, length + 1] token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length + 1)).astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The peer


def torch_model(config: LLMConfig):
    """The decoder as a torch module, its weights those of `weights`."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    s = config.stack

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            heads, kv_heads = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
            self.attention_norm = nn.RMSNorm(s.width, eps=s.norm_eps)
            self.query, self.key, self.value = (linear(s.width, n) for n in (heads, kv_heads, kv_heads))
            self.output = linear(heads, s.width)
            self.ffn_norm = nn.RMSNorm(s.width, eps=s.norm_eps)
            self.gate, self.up = linear(s.width, s.mlp_width), linear(s.width, s.mlp_width)
            self.down = linear(s.mlp_width, s.width)

        def forward(self, x, cos, sin):
            B, L, _ = x.shape
            y = self.attention_norm(x)
            query, key, value = (
                projection(y).view(B, L, -1, s.head_dim).transpose(1, 2)
                for projection in (self.query, self.key, self.value)
            )
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            grouped = s.num_heads != s.num_kv_heads
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            x = x + self.output(y.transpose(1, 2).reshape(B, L, -1))
            y = self.ffn_norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Decoder(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.token_embedding = nn.Embedding(config.vocab_size, s.width)
            self.layers = nn.ModuleList(Layer() for _ in range(s.num_layers))
            self.norm = nn.RMSNorm(s.width, eps=s.norm_eps)
            self.head = linear(s.width, config.vocab_size)
            frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
            angles = torch.outer(torch.arange(length), frequency).repeat(1, 2)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

        def forward(self, tokens, targets):
            x = self.token_embedding(tokens)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    def build(length):
        model, found = Decoder(length), {}
        for path, value in weights(config).items():
            *place, kind = path.split("/")
            for i, layer in enumerate(value if place[0] == "stack" else [value]):
                name = f"layers.{i}.{place[-1]}.weight" if place[0] == "stack" else f"{place[0]}.weight"
                found[name] = torch.from_numpy(layer.T.copy() if kind == "kernel" else layer.copy())
        model.load_state_dict(found)
        return model

    return build


def torch_steps(config: LLMConfig, rows, length, compiled):
    """Endless steps; each gives its loss."""
    import torch

    torch.set_num_threads(os.cpu_count())
    model = torch_model(config)(length)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=EPSILON, fused=True)
    run = torch.compile(model) if compiled else model
    batch = torch.from_numpy(token_batch(config, rows, length)).long()
    while True:
        optimizer.zero_grad(set_to_none=True)
        loss = run(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        yield loss.item()


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def our_steps(config: LLMConfig, rows, length):
    """Endless steps of the stage `pretrain`; each gives its loss."""
    import jax
    from flax import traverse_util

    from hovle_jax import recipes
    from hovle_jax.config import OptimizerConfig, RunConfig
    from hovle_jax.model.config import HoVLEConfig
    from hovle_jax.sharding.mesh import make_mesh
    from hovle_jax.training.setup import build
    from hovle_jax.training.stages import STAGES
    from hovle_jax.training.state import make_state
    from hovle_jax.training.step import train_step

    run = RunConfig.from_dict(recipes.base("pretrain", "tiny").to_dict())
    optimizer = OptimizerConfig(
        learning_rate=RATE,
        final_fraction=1.0,
        warmup_steps=0,
        b1=B1,
        b2=B2,
        eps=EPSILON,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    run = dataclasses.replace(run, model=HoVLEConfig(embedding=None, llm=config), optimizer=optimizer)
    tokens = token_batch(config, rows, length)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_weights": np.ones((rows, length), np.float32),
    }
    made, values = build(run, make_mesh(run.mesh)), weights(config)
    params = traverse_util.flatten_dict(made.abstract_params()["llm"], sep="/")
    params = {name: jax.device_put(values[name], leaf.sharding) for name, leaf in params.items()}
    params = {"llm": traverse_util.unflatten_dict(params, sep="/")}
    state, batch = make_state(STAGES[run.stage], made, params), made.placement.put_batch(batch)
    while True:
        state, metrics = train_step(state, batch, stage=run.stage, run=made)
        jax.block_until_ready(state)
        yield float(metrics["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Turns

SIDES = {
    "ours": our_steps,
    "torch eager": lambda *shape: torch_steps(*shape, compiled=False),
    "torch compiled": lambda *shape: torch_steps(*shape, compiled=True),
}


if __name__ == "__main__":
    if not shutil.which(os.environ.get("CXX", "g++")):
        del SIDES["torch compiled"]
    alternating.main(__doc__, __file__, SIDES, SIZES)
