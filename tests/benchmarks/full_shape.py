"""HoVLE at its full shape, one image and a question: this project's engine against PyTorch with transformers.

    pip install -e ".[benchmark]" && python tests/benchmarks/full_shape.py --sides "bfloat16,int8,torch bfloat16"

One tile of 448 and 256 tokens of text in, 120 tokens out, as in table 6 of the paper; weights are random. The peer is
what HoVLE without HD is (`convert export --as llama`): transformers' Llama of 32 layers over input vectors, with its
cache, greedily, in a plain loop. Each side is a process of its own with as many threads as there are cores; they take
turns of one answer. Prints one JSON object: the median seconds to the first token and tokens a second after it, and for
ours the share of the read bandwidth (measured between the turns) that decoding reaches.

On a GPU: `--sides bfloat16,float32,int8`; the peer is made for the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

TEXT, NEW = 256, 120
SIDES = ("float32", "bfloat16", "int8", "torch float32", "torch bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# Ours


class _Ids:
    """What an engine needs of a tokenizer, for answers that nobody reads."""

    stop_ids, image_id, clean_up = (), 92_546, False

    def decode(self, ids):
        return ""


def random_params(hovle, int8: bool) -> dict:
    """Weights as an engine takes them, layer by layer, so that no second copy is needed."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from hovle_jax.inference.layer import LayerWeights
    from hovle_jax.inference.weights import head_of

    c, dtype = hovle.config, jnp.dtype(hovle.execution.dtype)
    block = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, 2**20), dtype)

    def draw(*shape):
        return jnp.resize(block, shape)

    def layer(stack):
        D, F, C = stack.width, stack.mlp_width, stack.head_dim
        outputs = {"query": (D, stack.num_heads * C), "key": (D, stack.num_kv_heads * C)}
        outputs |= {"value": outputs["key"], "output": (stack.num_heads * C, D)}
        outputs |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
        params = {name: {"kernel": draw(1, *shape)} for name, shape in outputs.items()}
        params |= {name: {"scale": jnp.ones((1, D), dtype)} for name in ("attention_norm", "ffn_norm")}
        return LayerWeights.of_stack(params, 1, dtype, int8)[0]

    P = c.embedding.patch_size
    tables = lambda rows, width: {"embedding": draw(rows, width)}
    width, llm = c.embedding.stack.width, c.llm
    shapes = jax.eval_shape(
        lambda: hovle.embedding.init(
            jax.random.key(0), jnp.zeros((1, 1, P * 2 * 16, P * 2 * 16, 3), jnp.uint8), method="embed_tiles"
        )
    )["params"]
    embedding = jax.tree.map(lambda leaf: draw(*leaf.shape), nn.meta.unbox(shapes))
    return {
        "embedding": embedding | {"text_embedding": tables(llm.table_rows, width)},
        "llm": {"token_embedding": tables(llm.table_rows, width), "norm": {"scale": jnp.ones(width, dtype)}},
        "layers": {
            "embedding": [layer(c.embedding.stack) for _ in range(c.embedding.stack.num_layers)],
            "llm": [layer(llm.stack) for _ in range(llm.stack.num_layers)],
        },
        "head": head_of(draw(llm.table_rows, width), dtype, int8),
    }


def our_answers(side):
    """Endless answers; each gives (seconds to the first token, seconds of the others)."""
    from hovle_jax.data.batch import Sample
    from hovle_jax.data.processor import Processor
    from hovle_jax.inference.bench.traffic import weight_bytes
    from hovle_jax.inference.engine import Engine, Request, Stream
    from hovle_jax.inference.generate import Answerer
    from hovle_jax.inference.texts import TextSoFar
    from hovle_jax.model.execution import Execution
    from hovle_jax.model.hovle import HoVLE
    from hovle_jax.model.presets import MODELS

    dtype = {"int8": "float32"}.get(side, side)
    hovle = HoVLE(MODELS["hovle"](), Execution(dtype=dtype, unroll_layers=True))
    params = random_params(hovle, side == "int8")
    answerer = Answerer(hovle, {}, Processor(_Ids(), tokens_per_tile=hovle.config.embedding.tokens_per_tile))
    engine = Engine(answerer, slots=1, length=TEXT + hovle.config.embedding.tokens_per_tile + NEW, params=params)
    weights = weight_bytes(params)
    yield {"weights": weights}
    for number in range(10**6):
        rng = np.random.default_rng(number)
        image = np.full(hovle.config.embedding.tokens_per_tile, _Ids.image_id, np.int32)
        tokens = np.concatenate([image, rng.integers(3, 90_000, TEXT).astype(np.int32)])
        size = hovle.config.embedding.tile_size
        tiles = rng.integers(0, 255, (1, size, size, 3), np.uint8)
        sample = Sample(tokens, np.zeros(len(tokens), bool), tiles)
        start = time.perf_counter()
        stream = engine.enqueue(Stream(engine._read(sample), Request(NEW), (), TextSoFar(_Ids()), lambda piece: None))
        while not stream.tokens:
            engine.step()
        first = time.perf_counter()
        engine.run()
        yield first - start, time.perf_counter() - first


# ---------------------------------------------------------------------------------------------------------------------
# The peer


def torch_answers(side):
    """As `our_answers`."""
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from hovle_jax.model.presets import MODELS

    c = MODELS["hovle"]()
    stack, dtype = c.llm.stack, getattr(torch, side.split()[1])
    config = LlamaConfig(
        vocab_size=c.llm.vocab_size, hidden_size=stack.width, intermediate_size=stack.mlp_width,
        num_hidden_layers=c.embedding.stack.num_layers + stack.num_layers, num_attention_heads=stack.num_heads,
        num_key_value_heads=stack.num_kv_heads, max_position_embeddings=32_768, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    block = torch.randn(2**20) * 0.02
    for name, leaf in model.named_parameters():
        flat = leaf.data.view(-1)
        for at in range(0, flat.numel(), len(block)):
            flat[at : at + len(block)] = block[: flat.numel() - at]
        if "norm" in name:
            leaf.data.fill_(1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    patch = c.embedding.patch_size * 2
    kernel = block[: 2048 * 64].repeat(patch * patch * 3 // 64 + 1)[: 2048 * patch * patch * 3].view(2048, -1)
    yield {"weights": sum(p.numel() * p.element_size() for p in model.parameters()) - model.lm_head.weight.nbytes}
    with torch.inference_mode():
        for number in range(10**6):
            rng = torch.Generator().manual_seed(number)
            ids = torch.randint(3, 90_000, (1, TEXT), generator=rng)
            tile = torch.randint(0, 255, (1, 3, 448, 448), generator=rng, dtype=torch.uint8)
            start = time.perf_counter()
            patches = F.unfold(tile.to(dtype) / 255, patch, stride=patch).transpose(1, 2)
            x = torch.cat([patches @ kernel.T, model.model.embed_tokens(ids)], dim=1)
            out = model(inputs_embeds=x, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            first = time.perf_counter()
            for _ in range(NEW - 1):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.item()
            yield first - start, time.perf_counter() - first


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def serve(side):
    """A child: what its weights weigh, then for each line on stdin the seconds of one answer."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share a GPU
    if side == "bandwidth":
        from hovle_jax.system.read_bandwidth import read_bandwidth

        answers = iter(lambda: (read_bandwidth(), 0), None)
        print(json.dumps({"weights": 0}), flush=True)
    else:
        answers = torch_answers(side) if side.startswith("torch") else our_answers(side)
        print(json.dumps(next(answers)), flush=True)
    for _ in sys.stdin:
        print(json.dumps(next(answers)), flush=True)


class Child:
    """One side in its own process; it works only while it is asked to."""

    def __init__(self, side):
        command = [sys.executable, __file__, "--child", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.weights, self.turns = json.loads(self.process.stdout.readline())["weights"], []

    def take_turn(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(sides, rounds):
    """-> {side: figures}."""
    children = {side: Child(side) for side in (*sides, "bandwidth")}
    for _ in range(rounds + 1):  # the first compiles
        for child in children.values():
            child.take_turn()
    for child in children.values():
        child.close()
    median = lambda side, part: statistics.median(turn[part] for turn in children[side].turns[1:])
    read, found = median("bandwidth", 0), {}
    for side in sides:
        rate = (NEW - 1) / median(side, 1)
        found[side] = {
            "seconds to the first token": round(median(side, 0), 4),
            "tokens per second": round(rate, 2),
            "GB of weights a token": round(children[side].weights / 1e9, 3),
            "share of bandwidth": round(rate * children[side].weights / read, 3),
        }
    return {"sides": found, "GB/s read": round(read / 1e9, 1), "cores": os.cpu_count()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="bfloat16,int8,torch bfloat16", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments.child)
        return
    print(json.dumps(compare(arguments.sides.split(","), arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
