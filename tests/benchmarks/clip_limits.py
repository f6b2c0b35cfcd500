"""What a CLIP is known to be bad at, measured: handwritten digits, counting, words of several meanings.

    python -m tests.benchmarks.clip_limits --checkpoint runs_emoji/contrast

Digits are scikit-learn's 1,797 (pip install scikit-learn); counts are drawn here, one to six discs; words are names of
emoji that a longer name tells apart. Each line has the chance beside it. Nothing here is a bar.
"""

import argparse
import json

import numpy as np
from PIL import Image, ImageDraw

from hovle_jax.evaluation.clip.class_vectors import made_vectors
from hovle_jax.inference.encoder import Encoder
from tests.benchmarks.emoji_clip import read

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = ("{}", "keycap: {}", "the number {}", "a handwritten {}")
COUNT_TEMPLATES = ("{}", "a picture of {}")
SIDE = 128
# A word, and two names of emoji that it may mean.
MEANINGS = (
    ("bat", "bat", "cricket game"), ("mouse", "mouse face", "computer mouse"), ("ring", "ring", "boxing glove"),
    ("diamond", "diamond suit", "gem stone"), ("bell", "bell", "bell pepper"), ("dog", "dog face", "hot dog"),
    ("star", "star", "shooting star"), ("horn", "postal horn", "ram"), ("bow", "bow and arrow", "ribbon"),
    ("nail", "nail polish", "hammer"), ("palm", "palm tree", "palms up together"), ("crown", "crown", "tooth"),
)  # fmt: skip


def digits():
    """-> (Pillow images, labels)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    dark = [255 - np.round(image * 255 / 16).astype(np.uint8) for image in found.images]
    return [Image.fromarray(image).resize((SIDE, SIDE)).convert("RGB") for image in dark], found.target


def discs(count, rng):
    """So many discs of one size that do not touch."""
    image, centres = Image.new("RGB", (SIDE, SIDE), "white"), []
    draw = ImageDraw.Draw(image)
    while len(centres) < count:
        centre = rng.integers(14, SIDE - 14, 2)
        if all(np.hypot(*(centre - other)) > 26 for other in centres):
            centres.append(centre)
            x, y = map(int, centre)
            draw.ellipse((x - 11, y - 11, x + 11, y + 11), fill=(220, 40, 40))
    return image


def counting(rng, each=50):
    pairs = [(discs(count, rng), count - 1) for count in range(1, 7) for _ in range(each)]
    return [image for image, _ in pairs], np.asarray([label for _, label in pairs])


def accuracy(encoder, images, labels, names, templates):
    nearest = np.argmax(encoder.images(images) @ made_vectors(encoder, names, templates).T, axis=1)
    return float(np.mean(nearest == labels))


def words(encoder):
    """-> {what: share}: a word alone finds both of its meanings among its ten nearest images; a name its own image."""
    images, rows = read("train")
    vectors, names = encoder.images(images), np.asarray([row["caption"] for row in rows])
    known = [(word, *senses) for word, *senses in MEANINGS if all(sense in names for sense in senses)]
    ten = lambda text: set(names[np.argsort(-(vectors @ encoder.texts([text])[0]))[:10]])
    both = [set(senses) <= ten(word) for word, *senses in known]
    told = [sense in ten(sense) for _, *senses in known for sense in senses]
    return {
        "words of several meanings": len(known),
        "both meanings among a word's ten nearest": float(np.mean(both)),
        "a full name's own image among its ten nearest": float(np.mean(told)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="the folder of a finished contrast run or an import")
    encoder = Encoder.load(parser.parse_args().checkpoint, batch_size=128)
    counts = [f"{word} {'disc' if word == 'one' else 'discs'}" for word in DIGITS[1:7]]
    found = {
        "handwritten digits (chance 0.10)": accuracy(encoder, *digits(), DIGITS, DIGIT_TEMPLATES),
        "counting one to six (chance 0.17)": accuracy(
            encoder, *counting(np.random.default_rng(0)), counts, COUNT_TEMPLATES
        ),
    } | words(encoder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
