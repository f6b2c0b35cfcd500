"""The metadata of a GGUF file, of an LLM and of its tokenizer, as llama.cpp reads it: the way back of `gguf`.

Integers are uint32 there, numbers with a point float32. The keys' names are llama.cpp's.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from hovle_jax.data.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import llama
from hovle_jax.formats.gguf import CONTROL, NEIGHBOURING_PAIRS, PRE_TOKENIZERS, USER_DEFINED
from hovle_jax.model.config import LLMConfig, StackConfig
from hovle_jax.model.rotary import frequencies

NORMAL, UNUSED, BYTE = 1, 5, 6  # SentencePiece's numbers of a piece's type, which GGUF took over
LOWEST = -1000.0  # the score of a token that is never merged


def llama_cpp_config(config: LLMConfig) -> LLMConfig:
    """An LLM as llama.cpp has it: InternLM2 is a Llama, and dynamic NTK, which it lacks, bounds the length.

    Raises:
      UserError: llama.cpp's architecture lacks an option; says which.
    """
    stack, longest = config.stack, config.max_length
    if stack.rope_scaling is not None and stack.rope_scaling.kind == "dynamic":
        longest = min(longest, stack.rope_scaling.original_length)
        stack = dataclasses.replace(stack, rope_scaling=None)
    arch = config.family if config.family in NEIGHBOURING_PAIRS else "llama"
    _check_scaling(stack.rope_scaling, arch)
    config = dataclasses.replace(config, stack=stack, max_length=longest, family=arch, head_stored=False)
    llama.config_to_json(config)  # refuses what the architecture has not
    return config


def _check_scaling(scaling, arch):
    """Raises UserError for scaled positions that llama.cpp would rotate otherwise."""
    if scaling is None:
        return
    if scaling.kind == "yarn" and not scaling.truncate:
        raise UserError(
            "llama.cpp rounds YaRN's bounds to whole pairs, and this model does not (rope_scaling.truncate=False); "
            "export it without --as, for other engines"
        )
    if scaling.kind in ("llama3", "factors") and arch != "llama":
        raise UserError(
            f"llama.cpp reads rotary factors (rope_scaling of kind {scaling.kind!r}) of Llama alone, not of {arch}; "
            "export it without --as, for other engines"
        )


def config_to_metadata(config: LLMConfig) -> dict[str, Any]:
    """Metadata of an LLM from `llama_cpp_config`; with `rope_factors`, the inverse of `gguf.config_from_metadata`."""
    stack = config.stack
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "block_count": stack.num_layers,
        "embedding_length": stack.width,
        "feed_forward_length": stack.mlp_width,
        "attention.head_count": stack.num_heads,
        "attention.head_count_kv": stack.num_kv_heads,
        "attention.key_length": stack.head_dim,
        "attention.value_length": stack.head_dim,
        "attention.layer_norm_rms_epsilon": float(stack.norm_eps),
        "rope.dimension_count": stack.head_dim,
        "rope.freq_base": float(stack.rope_theta),
        **_scaling_to_metadata(stack.rope_scaling),
    }
    return {f"{config.family}.{key}": value for key, value in keys.items()}


def _scaling_to_metadata(scaling):
    if scaling is None or scaling.kind == "llama3":  # all of it is in the factors
        return {}
    if scaling.kind == "factors":
        return {"rope.scaling.attn_factor": float(scaling.attention_factor or 1.0)}
    keys = {
        "rope.scaling.type": scaling.kind,
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_length,
    }
    if scaling.kind == "yarn":
        keys |= {f"rope.scaling.yarn_{name}": float(getattr(scaling, name)) for name in ("beta_fast", "beta_slow")}
        if scaling.attention_factor:  # llama.cpp multiplies the paper's factor by its key
            own = scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor))
            keys |= {"rope.scaling.attn_factor": own}
    return keys


def rope_factors(stack: StackConfig) -> np.ndarray | None:
    """[head dim / 2] float32, what each pair's frequency is divided by; None where no tensor says it."""
    if stack.rope_scaling is None or stack.rope_scaling.kind not in ("llama3", "factors"):
        return None
    plain, _ = frequencies(dataclasses.replace(stack, rope_scaling=None))
    return (plain / frequencies(stack)[0]).astype(np.float32)


def tokenizer_to_metadata(tokenizer: Tokenizer, vocab_size: int, template: str) -> dict[str, Any]:
    """Metadata of a tokenizer.

    Args:
      vocab_size: of the model; ids that the tokenizer lacks are unused tokens.
      template: of chats, in Jinja.
    Raises:
      UserError: llama.cpp has no tokenizer of this kind.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokens, keys = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        tokens, keys = _byte_level_bpe(tokenizer)
    else:
        raise UserError(f"llama.cpp has no {type(tokenizer).__name__}")
    for name, index in tokenizer.specials.items():
        tokens[index] = name, LOWEST, CONTROL
    rows = [tokens.get(i, (f"[PAD{i}]", LOWEST, UNUSED)) for i in range(vocab_size)]
    lists = {"tokens": [row[0] for row in rows], "token_type": [row[2] for row in rows]}
    if keys["model"] == "llama":
        lists |= {"scores": [row[1] for row in rows]}
    keys = keys | lists | _ends(tokenizer) | {"add_eos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": template}


def ids_as_tokens(vocab_size: int) -> dict[str, Any]:
    """Metadata in place of a tokenizer: the text of a token is its id in brackets.

    llama.cpp has a name for files without tokens ('none'), and its server ends at the first answer of one.
    """
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": [f"[{i}]" for i in range(vocab_size)],
        "scores": [LOWEST] * vocab_size,
        "token_type": [NORMAL] * vocab_size,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _ends(tokenizer):
    """The special ids: where everything begins, and what ends an answer."""
    stops = dict.fromkeys((tokenizer.eos, *tokenizer.stop_ids))
    ends = dict(zip(("eos", "eot", "eom"), (i for i in stops if i >= 0), strict=False))
    begin = {} if tokenizer.bos is None else {"bos": tokenizer.bos}
    return {f"{name}_token_id": i for name, i in (begin | ends).items()}


def _sentencepiece(tokenizer):
    """-> ({id: (token, score, type)}, keys) of a SentencePiece model of the kind BPE, with its bytes."""
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # whose classes are made when it is imported
    model = protocol.ModelProto.FromString(tokenizer.model)
    kind = model.trainer_spec.model_type
    if kind != protocol.TrainerSpec.BPE:
        name = protocol.TrainerSpec.ModelType.Name(kind).lower()
        raise UserError(f"llama.cpp reads SentencePiece models of the kind bpe, and this one is {name}")
    if not any(piece.type == BYTE for piece in model.pieces):
        raise UserError("llama.cpp reads SentencePiece models with pieces for bytes, and this one has none")
    tokens = {i: (_text(piece), piece.score, piece.type) for i, piece in enumerate(model.pieces)}
    keys = {
        "model": "llama",
        "pre": "default",
        "unknown_token_id": max(model.trainer_spec.unk_id, 0),
        "add_bos_token": True,
        "add_space_prefix": tokenizer.adds_prefix,
    }
    return tokens, keys


def _text(piece):
    """llama.cpp looks for user-defined tokens in the text itself, before blanks are written as in pieces."""
    return piece.piece.replace("\u2581", " ") if piece.type == USER_DEFINED else piece.piece


def _byte_level_bpe(tokenizer):
    """-> ({id: (token, score, type)}, keys) of a tokenizer.json."""
    import tokenizers

    content = json.loads(tokenizer.text)
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UserError(f"llama.cpp reads a tokenizer.json of byte-level BPE, and this one is {model['type']}")
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError(f"llama.cpp does not normalise text as this tokenizer does ({content['normalizer']['type']})")
    tokens = {i: (token, 0.0, NORMAL) for token, i in model["vocab"].items()}
    tokens |= {t["id"]: (t["content"], 0.0, USER_DEFINED) for t in content.get("added_tokens", ())}
    first = tokenizers.Tokenizer.from_str(tokenizer.text).encode("a").ids[:1]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {"model": "gpt2", "pre": _pre(content), "merges": merges}
    return tokens, keys | {"add_bos_token": tokenizer.bos is not None and first == [tokenizer.bos]}


# Wherever the ways to split text before the merges differ.
PROBE = (
    "It's WE'LL they'd 3 12345 1,234.5  two   blanks\ttab\n\nlines \r\n end.\n"
    "naïve café (x)[0]=={y};//§ $ £5 東京タワー 한국어 عربي ٣٤٥ ½ ² 🙂👍 e\u0301 don\u2019t A1b22c333 _a_ -> \u00a0x "
)


def _pre(content):
    """The name of how text is split before the merges, found by what it does to a text."""
    import tokenizers

    def split(pre_tokenizer):
        model = tokenizers.Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": pre_tokenizer}))
        return model.pre_tokenizer and [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(PROBE)]

    own, ignores = split(content.get("pre_tokenizer")), bool(content["model"].get("ignore_merges"))
    for name, parts in PRE_TOKENIZERS.items():
        if own == split({"type": "Sequence", "pretokenizers": parts}) and ignores == (name == "llama-bpe"):
            return name
    raise UserError(f"this tokenizer.json splits text in none of the ways {', '.join(PRE_TOKENIZERS)}")
