"""A byte-level BPE with special tokens, as the library `tokenizers` trains it, and a ChatML template."""

import functools

import pytest

from hovle_jax.data.text.tokenizer import HuggingFaceTokenizer

LINES = [
    "What is the capital of France?", "Paris is the capital of France.", "It's 2026, isn't it?\n\n  Yes: 1234567.",
    "naïve café 東京 🙂", "def f(x):\n    return x + 1",
]  # fmt: skip
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def trained():
    """The library's own tokenizer; skips the test without the package."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(LINES * 3, trainer)
    return model


def library_ids(text):
    """Ids by the library itself, which takes the special tokens in a text for special ones."""
    return trained().encode(text, add_special_tokens=False).ids


def tokenizer():
    """The same, behind our interface."""
    return HuggingFaceTokenizer(trained().to_str(), stops=["<|im_end|>"])
