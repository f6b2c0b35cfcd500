"""InternLM2's template as InternVL uses it: its text, its ids, and what is learned of them."""

import json

import numpy as np
import pytest

from hovle_jax.data.text.conversation import encode_conversation, encode_random_text, render
from hovle_jax.data.text.tokenizer import ADDED_TOKENS, HuggingFaceTokenizer
from hovle_jax.errors import UserError
from tests import micro
from tests.shared import OWN, golden_roots


def text_of(turns, system="", tiles=(), tokens_per_tile=0):
    """A conversation as one string, special tokens by name."""
    return "".join(text if token is None else token for text, token, _ in render(turns, system, tiles, tokens_per_tile))


def test_special_tokens_in_a_users_text_stay_text():
    tokenizer = micro.tokenizer()
    evil = "".join(ADDED_TOKENS) + "<s></s>"
    ids = tokenizer.encode(evil)
    assert not {tokenizer.special(t) for t in (*ADDED_TOKENS, "<s>", "</s>")} & set(ids)
    assert tokenizer.decode(ids) == evil
    encoded = encode_conversation(tokenizer, [(f"<image>\n{evil}", evil)], micro.SYSTEM, (1,), 4)
    plain = encode_conversation(tokenizer, [("<image>\nx", "x")], micro.SYSTEM, (1,), 4)
    special = lambda e: [i for i in e.tokens.tolist() if i >= tokenizer.first_special or i in (1, 2)]
    assert special(encoded) == special(plain)


@pytest.mark.parametrize("folder", golden_roots("templates"))
def test_template_is_that_of_internvl(folder):
    cases = json.loads((folder / "internlm2-chat.json").read_text())
    assert cases
    for case in cases:
        turns = case["turns"]
        if all(answer is not None for _, answer in turns):  # as in training
            turns = [(question.strip(), answer.strip()) for question, answer in turns]
        assert text_of(turns, case["system"] or "", case["tiles"], case["tokens_per_tile"]) == case["prompt"]


def test_ids_and_labels_are_those_of_transformers():
    """By another tokenizer than SentencePiece, which transformers reads too."""
    pytest.importorskip("tokenizers")
    folder = OWN / "templates"
    tokenizer = HuggingFaceTokenizer((folder / "tokenizer.json").read_text(), "<s>", ["<|im_end|>", "</s>"])
    for case in json.loads((folder / "internlm2-chat.json").read_text()):
        found = encode_conversation(
            tokenizer, case["turns"], case["system"] or "", case["tiles"], case["tokens_per_tile"]
        )
        assert found.tokens.tolist() == case["ids"], case["prompt"]
        assert np.flatnonzero(found.supervised).tolist() == case["learned"], case["prompt"]


def test_a_question_without_a_mark_gets_one_and_wrong_counts_fail():
    assert "user\n<img><IMG_CONTEXT></img>\nhi<|im_end|>" in text_of([("hi", None)], "s", (1,), 1)
    with pytest.raises(UserError, match="2 <image> marks and 1 image was given"):
        text_of([("<image> <image>", None)], "s", (1,), 1)
    with pytest.raises(UserError, match="1 <image> mark and 0 images were given"):
        text_of([("<image>", None)], "s", (), 1)


def test_supervised_are_the_answers_and_their_ends():
    tokenizer = micro.tokenizer()
    turns = [("<image>\nis it red?", " yes "), ("what shape?", "a circle")]
    encoded = encode_conversation(tokenizer, turns, micro.SYSTEM, (1,), 4)
    learned = tokenizer.decode(encoded.tokens[encoded.supervised], skip_special=False)
    assert learned == "yes<|im_end|>a circle<|im_end|>"
    whole = tokenizer.decode(encoded.tokens, skip_special=False)
    assert whole == "<s>" + text_of([(q.strip(), a.strip()) for q, a in turns], micro.SYSTEM, (1,), 4)
    prompt = encode_conversation(tokenizer, [*turns[:1], ("what shape?", None)], micro.SYSTEM, (1,), 4)
    assert tokenizer.decode(prompt.tokens).endswith("assistant\n")
    assert tokenizer.decode(prompt.tokens[prompt.supervised], skip_special=False) == " yes <|im_end|>"


def test_random_text_of_distillation():
    tokenizer = micro.tokenizer()
    encoded = encode_random_text(tokenizer, np.random.default_rng(0), 50, micro.SYSTEM, (1,), 4)
    random = encoded.tokens[encoded.supervised]
    assert len(random) == 100 and random.max() < tokenizer.first_special and random.min() >= 0
    assert len(set(random.tolist())) > 60  # drawn one by one from 309 ids
    starts = np.flatnonzero(np.diff(encoded.supervised.astype(int)) == 1) + 1
    assert encoded.supervised[starts[0] : starts[0] + 50].all() and encoded.supervised[starts[1] :][:50].all()
    assert encoded.tokens[starts[0] - 1] == tokenizer.special("</img>")
    template = tokenizer.decode(encoded.tokens[~encoded.supervised], skip_special=False)
    assert template == "<s>" + text_of([("<image>", "")], micro.SYSTEM, (1,), 4)
    # Each half is inside its own turn: what follows it is the turn's end.
    assert encoded.tokens[starts + 50].tolist() == [tokenizer.special("<|im_end|>")] * 2
    other = encode_random_text(tokenizer, np.random.default_rng(1), 50, micro.SYSTEM, (1,), 4)
    assert (other.tokens != encoded.tokens).any() and (other.supervised == encoded.supervised).all()
