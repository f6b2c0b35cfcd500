"""The tokenizer and the chat template of a public checkpoint, in and out."""

import json

from hovle_jax.data.text import chat_template
from hovle_jax.data.text.tokenizer import CHAT_TEMPLATE, HuggingFaceTokenizer, SentencePieceTokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf

# InternVL2's and HoVLE's config names the template; these two differ in their default system message alone. The
# template in their tokenizer_config is InternLM2's own, which has more line ends.
BUILT_IN = ("internlm2-chat", "Hermes-2")
OTHER = "chat_template"  # our name for "the tokenizer's own"
TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json", CHAT_TEMPLATE,
)  # fmt: skip


def read_tokenizer(source, checkpoint):
    """-> Tokenizer of a checkpoint's folder or .gguf file, or None. Raises UserError for one that is not supported."""
    try:
        tokenizer = (_from_folder if source.is_dir() else _from_gguf)(source, checkpoint)
    except UserError:
        raise
    except Exception as error:  # the libraries' own errors, of many kinds
        raise UserError(f"the tokenizer's files in {source} are broken ({error})") from None
    if tokenizer is not None and tokenizer.chat_template is not None:
        chat_template.compiled(tokenizer.chat_template)
    return tokenizer


def _from_gguf(_, checkpoint):
    metadata = checkpoint.public_config
    tokenizer = gguf.tokenizer_from_metadata(metadata)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _from_folder(folder, checkpoint):
    def read(name):
        path = folder / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(found, dict):
            raise UserError(f"{path} is not a JSON object")
        return found

    settings, generation = read("tokenizer_config.json"), read("generation_config.json")
    decoder = settings.get("added_tokens_decoder") or {}
    added = {token["content"]: int(i) for i, token in decoder.items() if token.get("special")}
    added |= {token: i for token, i in read("added_tokens.json").items() if token not in added}
    if (folder / "tokenizer.model").is_file():
        added = {token: i for token, i in added.items() if token not in ("<s>", "</s>", "<unk>")}
        tokenizer = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), added or None)
    elif (folder / "tokenizer.json").is_file():
        ends = generation.get("eos_token_id", checkpoint.public_config.get("eos_token_id"))
        tokenizer = _from_json((folder / "tokenizer.json").read_text(), settings, ends)
    else:
        return None
    if checkpoint.kind == "llm" or checkpoint.public_config.get("template", BUILT_IN[0]) not in BUILT_IN:
        tokenizer.chat_template = _template(folder, settings)
    return tokenizer


def _from_json(text, settings, ends):
    """`text` is tokenizer.json, `settings` tokenizer_config.json, `ends` the ids that end an answer."""
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


def write_tokenizer(tokenizer, folder):
    """The files of a public checkpoint, from which `read_tokenizer` and `transformers` make the same tokenizer."""
    tokenizer.save(folder)
    names = {i: token for token, i in tokenizer.specials.items()}
    added = {str(i): {"content": names[i], "special": True} for i in sorted(names)}
    for token in added.values():
        token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    is_json = isinstance(tokenizer, HuggingFaceTokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer",
        "bos_token": names.get(tokenizer.bos),
        "eos_token": names.get(tokenizer.eos),
        "added_tokens_decoder": added,
    }
    if tokenizer.chat_template is not None:
        settings |= {"chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    stops = list(tokenizer.stop_ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}, indent=2) + "\n")
    (folder / "tokenizer_settings.json").unlink(missing_ok=True)  # says less than these
