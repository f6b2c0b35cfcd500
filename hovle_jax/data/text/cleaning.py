"""What CLIP and SigLIP do to a caption before it is tokenised, and CLIP's byte-level BPE from its own files."""

import gzip
import html
import json
import pathlib
import string
import unicodedata
from collections.abc import Callable, Sequence

from hovle_jax.errors import UserError

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # what is a word to CLIP
MOST_MERGES = 49152 - 256 - 2  # lines of OpenAI's list that are read; more follow
MOST_BYTES = 2**26  # of that list, unpacked


def _plain_characters():
    """{code point: what stands for it}: full widths, ligatures, curly quotes, and controls, which are removed."""
    wide = [0x3000, *range(0xFF01, 0xFFF0)]
    ligatures = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    table: dict[int, str | None] = {code: unicodedata.normalize("NFKC", chr(code)) for code in wide + ligatures}
    table[0xFB05] = "\u017ft"
    table |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
    controls = (*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    return table | dict.fromkeys(controls)


PLAIN = _plain_characters()


def repaired(text: str) -> str:
    """open_clip's first step: broken Unicode is mended, HTML's entities (twice escaped ones, too) become characters.

    open_clip mends by the package ftfy. Where it is not installed this is what ftfy does to sound text; text that was
    decoded by a wrong encoding stays as it is then.
    """
    try:
        import ftfy
    except ModuleNotFoundError:
        text = html.unescape(text) if "<" not in text else text
        text = unicodedata.normalize("NFC", text.translate(PLAIN))
    else:
        text = ftfy.fix_text(text)
    return html.unescape(html.unescape(text)).strip()


def _one_blank(text):
    return " ".join(text.split())


def _siglip(text):
    # U+2581 is SentencePiece's sign for a blank.
    return _one_blank(text.replace("\u2581", " ").lower().translate(NO_PUNCTUATION))


CLEANERS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "lower": str.lower,
    "siglip": _siglip,
    "clip_lower": lambda text: _one_blank(repaired(text)).lower(),
    "clip_whitespace": lambda text: _one_blank(repaired(text)),
    "clip_canonicalize": lambda text: _one_blank(repaired(text).replace("_", " ").translate(NO_PUNCTUATION).lower()),
}  # by the names of open_clip's `clean`, and those of Hugging Face's tokenizers


def byte_letters() -> list[str]:
    """The printable character that stands for each byte, in the order of CLIP's vocabulary (GPT-2's byte-level BPE)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) for byte in own] + [chr(256 + i) for i in range(len(others))]


def openai_merges(path: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's bpe_simple_vocab_16e6.txt.gz -> (vocabulary {token: id}, merges in their order).

    The vocabulary is made of the bytes, the bytes at a word's end, the merges and two special tokens.

    Raises:
      UserError: it is another file.
    """
    with gzip.open(path) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES:,} bytes; it is not CLIP's list of merges")
    lines = text.decode().split("\n")[1 : MOST_MERGES + 1]
    merges = [tuple(line.split()) for line in lines if line]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} is not a list of merges, two pieces in a line")
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    return {token: i for i, token in enumerate([*tokens, START, END])}, [(a, b) for a, b in merges]


def listed_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    """The merges of a merges.txt, whose first line may be a comment."""
    lines = path.read_text("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} is not a list of merges, two pieces in a line")
    return [(a, b) for a, b in merges]


def clip_json(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], is_cleaned: bool) -> str:
    """The content of a tokenizer.json for CLIP's byte-level BPE.

    Args:
      is_cleaned: whether texts come cleaned, as in open_clip; else they are composed (NFC) and lower-cased, and blanks
        are joined, as Hugging Face's CLIP tokenizer does.
    Raises:
      UserError: the special tokens are missing.
    """
    for token in (START, END):
        if token not in vocabulary:
            raise UserError(f"the vocabulary lacks {token!r}: it is not CLIP's")
    steps = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]
    # In the package regex, case-insensitively, U+0345 is no character at all, and U+017F an s.
    of_regex = PATTERN.replace("[^", "[^\\x{0345}").replace("'s", "'[s\u017f]")
    words = of_regex if is_cleaned else PATTERN
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": vocabulary[token], "content": token, **special} for token in (START, END)],
            "normalizer": None if is_cleaned else {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [byte_level, {"type": "Replace", "pattern": {"String": "</w>"}, "content": " "}],
            },
            "model": {
                "type": "BPE",
                "unk_token": END,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "</w>",
                "fuse_unk": False,
                "vocab": vocabulary,
                "merges": [list(merge) for merge in merges],
            },
        },
        ensure_ascii=False,
    )
