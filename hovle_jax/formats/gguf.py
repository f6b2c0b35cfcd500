"""GGUF files of Llama, Qwen2 and Qwen3: metadata -> config, quantised blocks -> float32.

`gguf_header` reads the header; the package `gguf` of the llama.cpp project (extra `convert`) dequantises.
`gguf_metadata` is the way back.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from hovle_jax.data.text.tokenizer import HuggingFaceTokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats.fields import REQUIRED, count, field, number, only
from hovle_jax.formats.gguf_header import read_header
from hovle_jax.formats.mapping import LINEAR, SAME, Rule, Transform, nested, padded, rule
from hovle_jax.formats.source import check_regular
from hovle_jax.model.config import LLMConfig, RopeScaling, StackConfig
from hovle_jax.model.rotary import frequencies

# llama.cpp rotates neighbouring pairs in Llama; its other models rotate halves, as everyone else does.
NEIGHBOURING_PAIRS = {"llama": True, "qwen2": False, "qwen3": False}
TABLE, NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LINEARS = {
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
NORMS = {
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "attn_q_norm": "query_norm",
    "attn_k_norm": "key_norm",
}


def package(action: str) -> Any:
    """The package `gguf`. Raises UserError without it, which says what needs it (`action`)."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f'{action} GGUF needs the package gguf; run: pip install "hovle_jax[convert]"') from None
    return gguf


class GGUFFile:
    """A memory-mapped GGUF file; a `TensorSource`.

    Attributes:
      metadata: {key: value}.
      shapes: {tensor name: shape}, the output dimension first.

    Raises:
      UserError: it is no GGUF file, or its counts and lengths are not those of a whole one.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._gguf = package("reading")
        block_sizes = {int(kind): sizes for kind, sizes in self._gguf.GGML_QUANT_SIZES.items()}
        check_regular(self.path)
        try:
            self._data = np.memmap(path, np.uint8, "r")
            self.metadata, self._tensors = read_header(self._data, block_sizes)
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a complete GGUF file ({error}); download it again") from None
        # Rotary factors are not weights: they belong to the config.
        self.rope_factors = self.read(ROPE_FACTORS).reshape(-1) if ROPE_FACTORS in self._tensors else None
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items() if name != ROPE_FACTORS}

    def file_of(self, _: str | None) -> pathlib.Path:
        """The file's path."""
        return self.path

    def read(self, name: str) -> np.ndarray:
        """-> float32 [out, in] (or [size]) of one tensor, dequantised. Raises UserError for an unknown block type."""
        tensor = self._tensors[name]
        kind = self._gguf.GGMLQuantizationType(tensor.kind)
        data = self._data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
        try:
            values = self._gguf.quants.dequantize(data, kind)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: tensor {name} has the type {kind.name}, which gguf cannot dequantise"
            ) from None
        return values.reshape(tensor.shape)


def config_from_metadata(
    metadata: dict[str, Any],
    tensor_names: Collection[str],
    rope_factors: np.ndarray | None = None,
    where: str = "GGUF metadata",
) -> LLMConfig:
    """-> LLMConfig. Which biases, norms and head there are is known from the tensors' names alone.

    Args:
      rope_factors: [head dim / 2], divisors of the rotary frequencies (Llama 3.1 and later).
    """
    arch = only(metadata, "general.architecture", tuple(NEIGHBOURING_PAIRS), where=where)

    def get(key, default=REQUIRED):
        return field(metadata, f"{arch}.{key}", default, where)

    def size(key, default=REQUIRED, minimum=1):
        return count(metadata, f"{arch}.{key}", default, where, minimum)

    width, num_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        only(metadata, f"{arch}.{key}", (head_dim,), head_dim, where)
    theta = _float(number(metadata, f"{arch}.rope.freq_base", 10000.0, where))
    stack = StackConfig(
        num_layers=size("block_count", minimum=0),
        width=width,
        num_heads=num_heads,
        num_kv_heads=size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_width=size("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(get, head_dim, theta, rope_factors, where),
        norm_eps=_float(number(metadata, f"{arch}.attention.layer_norm_rms_epsilon", where=where)),
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        output_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
    )
    stack.check(where)
    if f"{arch}.vocab_size" in metadata:
        vocab_size = size("vocab_size")
    else:
        vocab_size = len(field(metadata, "tokenizer.ggml.tokens", where=where))
    tied = "output.weight" not in tensor_names
    return LLMConfig(stack=stack, vocab_size=vocab_size, max_length=size("context_length"), tied=tied, family=arch)


def _float(value):
    """The shortest decimal number that is equal in float32, the metadata's type: 1e-5, not 9.99...e-6."""
    return float(str(np.float32(value)))


def _rope_scaling(get, head_dim, theta, factors, where):
    """-> RopeScaling or None, from the keys rope.scaling.* or the factors of rope_freqs.weight."""
    kind = get("rope.scaling.type", None)
    if factors is not None:
        if len(factors) != head_dim // 2:
            raise UserError(f"{where}: {ROPE_FACTORS} has {len(factors)} factors for a head_dim of {head_dim}")
        attention = _float(get("rope.scaling.attn_factor", 1.0))
        whole = int(get("context_length"))
        return _llama3_scaling(factors, theta) or RopeScaling(
            "factors", 1.0, whole, attention_factor=attention, factors=tuple(map(_float, factors))
        )
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{where}: rope.scaling.type={kind!r} is not supported; supported: none, linear, yarn")
    original = int(get("rope.scaling.original_context_length", get("context_length")))
    scaling = RopeScaling(kind, _float(get("rope.scaling.factor")), original)
    if kind == "linear":
        return scaling
    # llama.cpp multiplies the paper's factor by this one; our field is the product.
    more = _float(get("rope.scaling.yarn_attn_factor", get("rope.scaling.attn_factor", 1.0)))
    return dataclasses.replace(
        scaling,
        beta_fast=_float(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_float(get("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=0.0 if more == 1 else more * (1 + 0.1 * math.log(scaling.factor)),
    )


def _llama3_scaling(factors, theta):
    """The parameters of Llama 3.1's scaling, recovered from its factors; None where they follow another scheme.

    A GGUF file stores only the factors. The slowest pair is divided by the whole factor; from a pair between slow and
    fast follows how often it turns over the original length. The bounds are 1 and 4 turns in every such model.
    """
    factors = factors.astype(np.float64)
    whole, pairs = float(factors.max()), np.arange(len(factors))
    blended = pairs[(factors > 1 + 1e-4) & (factors < whole * (1 - 1e-4))]
    plain = theta ** (-pairs / len(factors))
    if not len(blended):
        return None
    at = blended[len(blended) // 2]
    turns = 1 + 3 * (1 / factors[at] - 1 / whole) / (1 - 1 / whole)
    found = RopeScaling("llama3", round(whole, 4), round(turns * 2 * math.pi / plain[at]))
    stack = StackConfig(0, 0, 0, 0, 2 * len(factors), 0, rope_theta=theta, rope_scaling=found)
    return found if np.allclose(plain / frequencies(stack)[0], factors, rtol=1e-5) else None


def _paired(num_heads):
    """Rows (head, pair, half) of a rotated projection <-> our (head, half, pair), transposed; biases likewise."""

    def split(x):
        return (x.reshape(num_heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape).T,)

    def join(x):
        x = x.T
        return x.reshape(num_heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Transform(split, join)


def stack_rules(stack: StackConfig, arch: str) -> list[Rule]:
    """The rules of a `Stack` of an architecture's layers."""
    has_bias = dict.fromkeys(("query", "key", "value"), stack.qkv_bias)
    has_bias |= {"output": stack.output_bias} | dict.fromkeys(("gate", "up", "down"), stack.mlp_bias)
    rotated = {"query": stack.num_heads, "key": stack.num_kv_heads} if NEIGHBOURING_PAIRS[arch] else {}
    layer = []
    for public, ours in LINEARS.items():
        paired = _paired(rotated[ours]) if ours in rotated else None
        layer.append((f"{public}.weight", f"{ours}/kernel", paired or LINEAR))
        if has_bias[ours]:
            layer.append((f"{public}.bias", f"{ours}/bias", paired or SAME))
    norms = [(f"{public}.weight", f"{ours}/scale", SAME) for public, ours in NORMS.items()]
    layer += norms if stack.qk_norm else norms[:2]
    layers = [rule(*entry, num_layers=stack.num_layers) for entry in layer]
    return nested(layers, public="blk.{layer}.", ours="layers")


def rules(config: LLMConfig) -> list[Rule]:
    """The rules of `LanguageModel`."""
    rows = config.vocab_size, config.table_rows
    return [
        rule(TABLE, "token_embedding/embedding", padded(SAME, *rows)),
        *nested(stack_rules(config.stack, config.family), ours="stack"),
        rule(NORM, "norm/scale", SAME),
        *([] if config.tied else [rule(HEAD, "head/kernel", padded(LINEAR, *rows))]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer. `tokenizer.ggml.pre` names how text is split before the merges; the expressions are the models' own.

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(numbers):
    pattern = {"Regex": "|".join((_CONTRACTIONS, _LETTERS, numbers, _REST))}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        _BYTES | {"use_regex": False},
    ]


PRE_TOKENIZERS = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
CONTROL, USER_DEFINED = 3, 4


def tokenizer_from_metadata(metadata: dict[str, Any], where: str = "GGUF metadata") -> HuggingFaceTokenizer:
    """-> HuggingFaceTokenizer of a byte-level BPE.

    Raises:
      UserError: another kind of vocabulary (SentencePiece's scores), or an unknown way to split text.
    """
    only(metadata, "tokenizer.ggml.model", ("gpt2",), where=where)
    pre = only(metadata, "tokenizer.ggml.pre", tuple(PRE_TOKENIZERS), "gpt-2", where)
    tokens = field(metadata, "tokenizer.ggml.tokens", where=where)
    kinds = field(metadata, "tokenizer.ggml.token_type", where=where)
    merges = [merge.split(" ") for merge in field(metadata, "tokenizer.ggml.merges", where=where)]
    added = [
        {"id": i, "content": token, "special": kind == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
        "ignore_merges": pre == "llama-bpe",
    }
    text = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _BYTES,
        "model": model,
    }
    name = lambda key: tokens[metadata[key]] if key in metadata else None
    stops = [name(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stops = [token for token in dict.fromkeys(stops) if token]
    return HuggingFaceTokenizer(json.dumps(text), name("tokenizer.ggml.bos_token_id"), stops)
