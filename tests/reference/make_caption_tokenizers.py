"""Makes tests/golden/caption-tokenizers: small tokenizers of CLIP's and SigLIP's kinds, and the public code's ids.

    pip install -e ".[reference]" open_clip_torch ftfy && python tests/reference/make_caption_tokenizers.py

Texts of all scripts, but none that a wrong decoding made, which ftfy alone repairs.
"""

import gzip
import io
import json
import random
import unicodedata

import ftfy
import sentencepiece
from common import GOLDEN
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, SiglipTokenizer

FOLDER = GOLDEN / "caption-tokenizers"
WORDS = "a photo of the cat's dog, don't they'll I'M WE'RE 123 4.5% it's &amp; &lt;b&gt; HELLO_world ... !!! naïve"
WORDS = [*WORDS.split(), "Straße", "ΣΊΣΥΦΟΣ", "İstanbul", "“quoted”", "ﬁne", "a\u200bb", "e\u0301", "\u0345", "'ſ"]
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x2000, 0x206F), (0x2100, 0x214F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F), (0x300, 0x36F), (0xFF00, 0xFFEF), (0x9, 0xD),
]  # fmt: skip


def texts(count):
    rng, found = random.Random(0), ["", " ", "a", "a  photo\nof A cat"]
    while len(found) < count:
        parts = []
        for _ in range(rng.randint(1, 6)):
            low, high = rng.choice(SCRIPTS)
            other = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 5)))
            parts.append(rng.choice([rng.choice(WORDS), other]))
        text = rng.choice([" ", "  ", "\n", ""]).join(parts)
        if ftfy.fix_encoding(text) == text and not any(unicodedata.category(c) == "Cn" for c in text):
            found.append(text)
    return found


def merges(lines, count):
    """Merges of a byte-level BPE with signs at the ends of words."""
    model = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator([line.lower() for line in lines], trainer)
    known = set(alphabet) | {f"{letter}</w>" for letter in alphabet}
    found = []
    for a, b in json.loads(model.to_str())["model"]["merges"]:
        if a in known and b in known:
            known.add(a + b)
            found.append((a, b))
    return found[:count]


def main():
    FOLDER.mkdir(exist_ok=True)
    lines = texts(400)
    pairs = merges([*lines, *WORDS * 20], 200)
    listed = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)])
    with gzip.GzipFile(FOLDER / "bpe_simple_vocab_16e6.txt.gz", "wb", mtime=0) as file:
        file.write(listed.encode())
    open_clip = SimpleTokenizer(str(FOLDER / "bpe_simple_vocab_16e6.txt.gz"))
    vocabulary = {token: i for token, i in open_clip.encoder.items() if "_of_text>" not in token}
    vocabulary |= {"<|startoftext|>": open_clip.sot_token_id, "<|endoftext|>": open_clip.eot_token_id}
    (FOLDER / "vocab.json").write_text(json.dumps(vocabulary) + "\n")
    (FOLDER / "merges.txt").write_text(listed + "\n")
    hugging_face = CLIPTokenizer(vocab=vocabulary, merges=pairs)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()] + WORDS * 3), model_writer=model,
        vocab_size=1050, hard_vocab_limit=False, model_type="unigram", pad_id=-1, bos_id=-1, eos_id=1, unk_id=2,
        user_defined_symbols=["<pad>"], normalization_rule_name="nmt_nfkc_cf", character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    (FOLDER / "spiece.model").write_bytes(model.getvalue())
    siglip = SiglipTokenizer(str(FOLDER / "spiece.model"))
    ids = {
        "open_clip": [open_clip.encode(text) for text in lines],
        "clip": [hugging_face(text, add_special_tokens=False)["input_ids"] for text in lines],
        "siglip": [siglip(text, add_special_tokens=False)["input_ids"] for text in lines],
    }
    (FOLDER / "expected.json").write_text(json.dumps({"texts": lines, "ids": ids}) + "\n")
    print(sum(path.stat().st_size for path in FOLDER.iterdir()), "bytes")


if __name__ == "__main__":
    main()
