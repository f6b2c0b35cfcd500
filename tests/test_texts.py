"""The text of an answer, token by token, is that of all its tokens at once; each token costs the same."""

import random

import pytest

from hovle_jax.data.text.tokenizer import HuggingFaceTokenizer
from hovle_jax.inference.texts import BROKEN, WINDOW, TextSoFar
from tests import micro

SENTENCE = "Ça coûte 3 €, don't you see?  She 's here — 你好 🙂🙂 !\nand so on . "


def byte_level():
    """A byte-level BPE of a few merges, as GPT-2's descendants have."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    made.train_from_iterator([SENTENCE] * 4, trainer)
    return HuggingFaceTokenizer(made.to_str(), stops=["<end>"])


def byte_fallback():
    """Pieces with blanks in front, and bytes for the rest, as Llama's tokenizer.json has."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["▁", *"abcdehnostuy.,?!'", "▁so", "▁n", "'t", "▁'", "▁."]
    made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return HuggingFaceTokenizer(made.to_str(), stops=["</s>"])


KINDS = {"sentencepiece": micro.tokenizer, "byte-level": byte_level, "byte-fallback": byte_fallback}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def said(tokenizer, ids, stops=()):
    text = TextSoFar(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    pieces.append(text.end())
    assert text.text == "".join(pieces)
    return pieces


def test_a_text_in_pieces_is_the_whole_text(tokenizer):
    ids = tokenizer.encode(SENTENCE * 12)
    assert len(ids) > 8 * WINDOW
    pieces = said(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids).strip() == (SENTENCE * 12).strip()
    assert not any(BROKEN in piece for piece in pieces) and sum(map(bool, pieces)) > len(ids) / 8


@pytest.mark.parametrize("clean_up", [False, True])
def test_any_tokens_give_what_they_give_at_once(tokenizer, clean_up, monkeypatch):
    """Specials, bytes that are no characters, blanks, and what cleaning up takes away again."""
    monkeypatch.setattr(tokenizer, "clean_up", clean_up)
    draw = random.Random(0)
    often = tokenizer.encode(" ' . n't 's ?  a") + [next(iter(tokenizer.specials.values()))]
    # Llama's decoder takes back all bytes that stand beside a broken one; what was said cannot be taken back.
    broken = 0 if tokenizer.decode(tokenizer.encode("é") + tokenizer.encode("好")[-1:])[:1] == BROKEN else 0.2
    for _ in range(60):
        ids = []
        for character in draw.choices(SENTENCE, k=60):
            token = tokenizer.encode(character)
            ids += token[: -1 if draw.random() < broken else None]
            ids += [draw.choice(often)] * (draw.random() < 0.3)
        assert "".join(said(tokenizer, ids)) == tokenizer.decode(ids).strip()


def test_what_follows_broken_bytes_is_not_lost(tokenizer):
    """A byte that completes no character once made the rest of the answer disappear."""
    broken, after = tokenizer.encode("é")[-2:-1], tokenizer.encode(" so")
    ids = [*tokenizer.encode("aé"), *broken, *after, *tokenizer.encode("b" * 3 * WINDOW)]
    text = "".join(said(tokenizer, ids))
    assert text.startswith("aé") and BROKEN in text and text.endswith("b" * 3 * WINDOW) and "so" in text
    assert BROKEN in "".join(said(tokenizer, broken * 600))


def test_each_token_costs_the_same(tokenizer, monkeypatch):
    lengths, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    said(tokenizer, tokenizer.encode(SENTENCE * 20))
    assert max(lengths) <= WINDOW + 16


def test_stops_are_met_wherever_they_are_cut(tokenizer):
    whole = "so so " * 30 + "and one?\n\nQ: 你好 no"
    for stop, before in ((["\n\nQ:"], "and one?"), (["你好"], "Q:"), (["??", "one?", "and one"], "so")):
        text = "".join(said(tokenizer, tokenizer.encode(whole), stop))
        assert text == whole[: whole.index(stop[-1])].rstrip() and text.endswith(before)
    assert "".join(said(tokenizer, tokenizer.encode("so \n"), ["\n\n"])) == "so"
