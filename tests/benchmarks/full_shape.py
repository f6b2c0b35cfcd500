"""HoVLE at its full shape, one image and a question: this project's engine against PyTorch with transformers.

    pip install -e ".[benchmark]" && python tests/benchmarks/full_shape.py --sides "bfloat16,int8,torch bfloat16"

One tile of 448 and 256 tokens of text in, 120 tokens out, as in table 6 of the paper; weights are random. The peer is
what HoVLE without HD is (`convert export --as llama`): HoVLE's patch embedding in PyTorch, then transformers' Llama of
32 layers over vectors, with its cache, greedily, in a plain loop. Each side is a process of its own with as many
threads as there are cores; they take turns of one answer. Prints one JSON object: the median seconds to the first token
and tokens a second after it, and for ours the share of the read bandwidth (measured between the turns) that decoding
reaches.

On a GPU: `--sides bfloat16,float32,int8`; the peer is made for the CPU.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

TEXT, NEW = 256, 120
SIDES = ("float32", "bfloat16", "int8", "torch float32", "torch bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def our_answers(side):
    """Endless answers; each gives (seconds to the first token, seconds of the others)."""
    from hovle_jax.config import ModelConfig
    from hovle_jax.inference.bench import subject
    from hovle_jax.inference.bench.cases import Case
    from hovle_jax.inference.bench.traffic import weight_bytes
    from hovle_jax.inference.engine import Request, Stream
    from hovle_jax.inference.texts import TextSoFar
    from hovle_jax.model.presets import MODELS

    c = MODELS["hovle"]()
    model = subject.random(ModelConfig(llm=c.llm, embedding=c.embedding), side)
    case = Case(1, 448, TEXT, NEW)
    answerer, engine = model.answerer(case), model.engine(case)
    yield {"weights": weight_bytes(model.params)}
    for number in range(10**6):
        sample, start = subject.draw(answerer, case, seed=number), time.perf_counter()
        stream = Stream(
            subject.read(answerer, sample), Request(NEW), (), TextSoFar(model.tokenizer), lambda piece: None
        )
        engine.enqueue(stream)
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
    visual = _torch_patches(c.embedding, block)
    yield {"weights": sum(p.numel() * p.element_size() for p in model.parameters()) - model.lm_head.weight.nbytes}
    with torch.inference_mode():
        for number in range(10**6):
            rng = torch.Generator().manual_seed(number)
            ids = torch.randint(3, 90_000, (1, TEXT), generator=rng)
            tile = torch.randint(0, 255, (1, 3, 448, 448), generator=rng, dtype=torch.uint8)
            start = time.perf_counter()
            x = torch.cat([visual(tile), model.model.embed_tokens(ids)], dim=1)
            out = model(inputs_embeds=x, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            first = time.perf_counter()
            for _ in range(NEW - 1):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.item()
            yield first - start, time.perf_counter() - first


def _torch_patches(embedding, block):
    """A tile [1, 3, S, S] uint8 -> [1, P / 4, D]: `HolisticEmbedding.embed_tiles` with 'pre', weights from `block`."""
    from torch.nn import functional as F

    size, width, side = embedding.patch_size, embedding.stack.width, embedding.position_grid
    drawn = lambda *shape: block.repeat(math.prod(shape) // len(block) + 1)[: math.prod(shape)].view(shape)
    patch, first, second = drawn(width, 3 * size**2), drawn(width, 4 * width), drawn(width, width)
    positions, bias = drawn(side**2, width), drawn(width)

    def vectors(tile):
        pixels = (tile.to(block.dtype) / 255 - 0.45) / 0.225
        x = F.linear(F.unfold(pixels, size, stride=size).transpose(1, 2), patch, bias) + positions
        x = x.view(1, side // 2, 2, side // 2, 2, width).transpose(2, 3).reshape(1, side**2 // 4, 4 * width)
        return F.linear(F.gelu(F.linear(x, first, bias)), second, bias)

    return vectors


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
