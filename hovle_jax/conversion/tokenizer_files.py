"""Reads and writes the tokenizer and the chat template of a public checkpoint."""

import json
import pathlib

from hovle_jax.conversion import caption_tokenizers
from hovle_jax.data.text import chat_template
from hovle_jax.data.text.broken import readable
from hovle_jax.data.text.fit import check_fit
from hovle_jax.data.text.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    SETTINGS,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    has_tokenizer,
    try_out,
)
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf
from hovle_jax.formats.families import Checkpoint
from hovle_jax.formats.fields import read_object

# InternVL2's and HoVLE's config names the template; these two differ only in their default system message. The template
# in their tokenizer_config is InternLM2's own, which has more line breaks.
BUILT_IN = ("internlm2-chat", "Hermes-2")
OTHER = "chat_template"  # our name for "the tokenizer's own"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json", CHAT_TEMPLATE, caption_tokenizers.CAPTION_PIECES, caption_tokenizers.OPENAI,
)  # fmt: skip


def read_tokenizer(source: pathlib.Path, checkpoint: Checkpoint) -> tuple[Tokenizer | None, str]:
    """-> (the Tokenizer of a checkpoint's folder or .gguf file, or None; the reason for None).

    Raises:
      UserError: its files are broken, or belong to another model.
    """
    with readable(f"the tokenizer in {source} cannot be read", REMEDY):
        tokenizer, reason = _found(source, checkpoint)
        if tokenizer is None:
            return None, reason
        try_out(tokenizer)
        if tokenizer.chat_template is not None:
            chat_template.check(tokenizer.chat_template)
    try:
        _check_fit(tokenizer, checkpoint, f"the tokenizer in {source}")
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    return tokenizer, ""


REMEDY = "put the model's own files there, or remove them to import the weights alone"


def _found(source, checkpoint):
    """-> (Tokenizer, "") or (None, the reason)."""
    try:
        if checkpoint.kind == "clip":
            found = caption_tokenizers.read_caption_tokenizer(source, checkpoint)
            return found, "" if found else f"{source} has none of {', '.join(caption_tokenizers.FILES)}"
        if not source.is_dir():
            return _from_gguf(checkpoint), ""
        if has_tokenizer(source):
            return _from_folder(source, checkpoint), ""
    except Unsupported as error:
        return None, str(error)
    return None, f"{source} has neither tokenizer.model nor tokenizer.json"


class Unsupported(UserError):
    """A sound tokenizer of a kind that cannot be read here."""


def _check_fit(tokenizer, checkpoint, where):
    """Raises UserError where the tokenizer's ids are not the model's."""
    configs = checkpoint.components()
    if checkpoint.kind == "clip":
        check_fit(tokenizer, checkpoint.config.text.vocab_size, where, sees_images=False)
        return
    embedding, public = configs.get("embedding"), checkpoint.public_config.get("embedding_config") or {}
    known = embedding.num_tokens if embedding else configs["llm"].vocab_size
    check_fit(tokenizer, known, where, sees_images=embedding is not None)
    expected = dict(public.get("special_token_maps") or {})
    if public.get("img_context_token_id") is not None:
        expected[IMAGE_TOKEN] = public["img_context_token_id"]
    for token, index in expected.items():
        found = tokenizer.specials.get(token)
        if found != index and not (found is None and token.startswith("<special ")):  # our name for a nameless one
            raise UserError(f"{where} has the id {found} for {token!r}, the model's config {index!r}")


def _from_gguf(checkpoint):
    metadata = checkpoint.public_config
    try:
        tokenizer = gguf.tokenizer_from_metadata(metadata)
    except UserError as error:
        raise Unsupported(str(error)) from None
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _from_folder(folder, checkpoint):
    read = lambda name: read_object(folder / name) if (folder / name).is_file() else {}
    settings, generation = read("tokenizer_config.json"), read("generation_config.json")
    decoder = settings.get("added_tokens_decoder") or {}
    added = {token["content"]: int(i) for i, token in decoder.items() if token.get("special")}
    added |= {token: i for token, i in read("added_tokens.json").items() if token not in added}
    if (folder / "tokenizer.model").is_file():
        added = {token: i for token, i in added.items() if token not in ("<s>", "</s>", "<unk>")}
        tokenizer = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), added or None)
    else:
        ends = generation.get("eos_token_id", checkpoint.public_config.get("eos_token_id"))
        tokenizer = _from_json((folder / "tokenizer.json").read_text(), settings, ends)
    tokenizer.clean_up = settings.get("clean_up_tokenization_spaces") is True
    if checkpoint.kind == "llm" or checkpoint.public_config.get("template", BUILT_IN[0]) not in BUILT_IN:
        tokenizer.chat_template = _template(folder, settings)
    return tokenizer


def _from_json(text, settings, ends):
    """From tokenizer.json (`text`), tokenizer_config.json (`settings`) and the ids that end an answer (`ends`)."""
    content = lambda token: token["content"] if isinstance(token, dict) else token
    ends = ends if isinstance(ends, list) else [ends]
    names = {token["id"]: token["content"] for token in json.loads(text).get("added_tokens", ())}
    stops = [content(settings.get("eos_token"))]
    stops += [names.get(i) for i in ends]
    return HuggingFaceTokenizer(text, content(settings.get("bos_token")), list(dict.fromkeys(t for t in stops if t)))


def _template(folder, settings):
    file = folder / CHAT_TEMPLATE
    template = file.read_text() if file.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the files from which `read_tokenizer` and `transformers` load the same tokenizer."""
    tokenizer.save(folder)
    names = {i: token for token, i in tokenizer.specials.items()}
    added = {str(i): {"content": names[i], "special": True} for i in sorted(names)}
    for token in added.values():
        token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    is_json = isinstance(tokenizer, HuggingFaceTokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer",
        "bos_token": None if tokenizer.bos is None else names.get(tokenizer.bos),
        "eos_token": names.get(tokenizer.eos),
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": tokenizer.clean_up,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):  # transformers reads neither from tokenizer.model
        settings |= dict.fromkeys(("add_prefix_space", "legacy"), tokenizer.adds_prefix)  # legacy: before each text
    if tokenizer.chat_template is not None:
        settings |= {"chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    stops = list(tokenizer.stop_ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}, indent=2) + "\n")
    (folder / SETTINGS).unlink(missing_ok=True)  # the files above say more
