"""easy-VQA's official test split: generated answers, and zero-shot classification with CLIP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.corpora import easy_vqa
from hovle_jax.data.images import single_tile
from hovle_jax.data.kinds.captions import caption_tokens
from hovle_jax.data.text.conversation import IMAGE_MARK
from hovle_jax.inference.generate import answer
from hovle_jax.inference.load import Loaded

MAX_NEW_TOKENS = 8
BATCH_SIZE = 256


def answer_kind(expected):
    """'yes/no', 'colour' or 'shape'."""
    if expected in ("yes", "no"):
        return "yes/no"
    return "shape" if expected in easy_vqa.SHAPES else "colour"


def question_answering(loaded: Loaded, limit=0):
    """Exact match of greedy answers over the official test questions.

    Args:
      limit: only the first so many questions (0: all 9,673).
    Returns:
      (scores, records): scores in percent, in all and by kind of answer; records are
      [(picture, question, answer, expected)].
    """
    asked = [(p, q, a) for p in easy_vqa.load("test") for q, a in p.questions]
    asked = asked[:limit] if limit else asked
    prompts = [(f"{IMAGE_MARK}\n{question}", [picture.image]) for picture, question, _ in asked]
    answers = answer(loaded.answerer, prompts, MAX_NEW_TOKENS, BATCH_SIZE)
    records = [(picture, question, got, expected) for (picture, question, expected), got in zip(asked, answers)]
    right = {"accuracy": []}
    for _, _, got, expected in records:
        for name in ("accuracy", f"accuracy {answer_kind(expected)}"):
            right.setdefault(name, []).append(got == expected)
    return {name: round(100 * float(np.mean(r)), 3) for name, r in right.items()} | {"questions": len(records)}, records


@functools.partial(jax.jit, static_argnames="clip")
def _image_vectors(params, tiles, *, clip):
    return clip.apply({"params": params}, tiles, method="encode_images")


def caption_vectors(loaded: Loaded, captions):
    """Unit vectors [N, E] of captions."""
    clip = loaded.models["clip"]
    text, tokenizer = clip.config.text, loaded.tokenizer
    ids = [[tokenizer.bos, *tokenizer.encode(caption), text.end_id] for caption in captions]
    tokens = np.stack([caption_tokens(one, text.context, text.end_id) for one in ids])
    return clip.apply({"params": loaded.params["clip"]}, tokens, method="encode_texts")


def zero_shot(loaded: Loaded, limit=0):
    """Accuracy over the 24 colour x shape captions, on the test pictures whose caption is determined.

    Args:
      limit: only the first so many pictures (0: all 888).

    Returns:
      (scores in percent, records [(picture, '', best caption, caption)]).
    """
    pictures = [p for p in easy_vqa.load("test") if p.caption]
    pictures = pictures[:limit] if limit else pictures
    classes = caption_vectors(loaded, easy_vqa.CAPTIONS)
    clip, size = loaded.models["clip"], loaded.config.clip.vision.image_size
    tiles = np.concatenate([single_tile(p.image, size) for p in pictures])
    padded = np.concatenate([tiles, np.zeros((-len(tiles) % BATCH_SIZE, *tiles.shape[1:]), np.uint8)])
    vectors = [
        _image_vectors(loaded.params["clip"], padded[i : i + BATCH_SIZE], clip=clip)
        for i in range(0, len(padded), BATCH_SIZE)
    ]
    best = np.asarray(jnp.argmax(jnp.concatenate(vectors)[: len(tiles)] @ classes.T, axis=1))
    records = [(picture, "", easy_vqa.CAPTIONS[i], picture.caption) for picture, i in zip(pictures, best)]
    parts = [(got.split(), expected.split()) for _, _, got, expected in records]
    scores = {
        "accuracy": np.mean([got == expected for got, expected in parts]),
        "accuracy colour": np.mean([got[1] == expected[1] for got, expected in parts]),
        "accuracy shape": np.mean([got[2] == expected[2] for got, expected in parts]),
    }
    return {name: round(100 * float(value), 3) for name, value in scores.items()} | {"pictures": len(pictures)}, records
