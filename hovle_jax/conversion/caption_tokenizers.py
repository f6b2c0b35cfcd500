"""Reads the tokenizer of a public CLIP: Hugging Face's files of CLIP and SigLIP, or OpenAI's list of merges."""

import pathlib
from typing import Any

from hovle_jax.data.text.cleaning import END, START, clip_json, listed_merges, openai_merges
from hovle_jax.data.text.tokenizer import CAPTION_PIECES, CaptionPieces, HuggingFaceTokenizer, Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats.families import Checkpoint
from hovle_jax.formats.fields import read_object

OPENAI = "bpe_simple_vocab_16e6.txt.gz"
FILES = (CAPTION_PIECES, "tokenizer.json", "vocab.json", OPENAI)
CLEANED = {"lower": "clip_lower", "whitespace": "clip_whitespace", "canonicalize": "clip_canonicalize"}


def read_caption_tokenizer(folder: pathlib.Path, checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a CLIP's folder; None where it has no file of one.

    Raises:
      UserError: its files are broken, or another model's.
    """
    siglip = checkpoint.config.family == "siglip"
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / CAPTION_PIECES).is_file():
        return CaptionPieces((folder / CAPTION_PIECES).read_bytes())
    if (folder / "tokenizer.json").is_file():
        clean = "lower" if siglip else _cleaning(checkpoint.public_config)
        tokenizer = _from_json((folder / "tokenizer.json").read_text("utf-8"), settings, clean, begins=not siglip)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary, merges = read_object(folder / "vocab.json"), listed_merges(folder / "merges.txt")
        tokenizer = _from_json(clip_json(vocabulary, merges, is_cleaned=False), settings)
    elif (folder / OPENAI).is_file():
        tokenizer = _from_json(clip_json(*openai_merges(folder / OPENAI), is_cleaned=True), settings, "clip_lower")
    else:
        return None
    pad = _content(settings.get("pad_token"))
    if pad is not None and checkpoint.config.family in ("clip", "siglip"):  # open_clip's config says it
        tokenizer.pad = tokenizer.id_of(pad)
    return tokenizer


def _cleaning(public_config):
    """How open_clip cleans texts for a tokenizer of Hugging Face's; CLIP's own does it itself."""
    text = (public_config.get("model_cfg") or {}).get("text_cfg") or {}
    if not text.get("hf_tokenizer_name"):
        return ""
    kind = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    if kind not in CLEANED:
        raise UserError(f"tokenizer_kwargs: clean={kind!r} is not supported; supported: {', '.join(CLEANED)}")
    return CLEANED[kind]


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _from_json(text: str, settings: dict[str, Any], clean: str = "", begins: bool = True) -> HuggingFaceTokenizer:
    names = HuggingFaceTokenizer(text).specials
    find = lambda key, *usual: next((t for t in (_content(settings.get(key)), *usual) if t in names), None)
    start, end = find("bos_token", START, "[CLS]"), find("eos_token", END, "[SEP]", "<eos>", "</s>")
    if end is None:
        raise UserError(f"it has no end token: there is none of eos_token={settings.get('eos_token')!r}, {END}")
    return HuggingFaceTokenizer(text, start if begins else None, [end], clean)
