"""Rows as InternVL and others write them: what they say, what a sample of them takes, and where it is cut."""

import dataclasses

import numpy as np
import pytest

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.records import Record, parse
from hovle_jax.data.images import Tiling
from hovle_jax.data.text.chat_template import IMAGE_MARK
from tests import broken, micro
from tests.source_files import image_file, reader_of


def record(tmp_path=None, **row):
    return parse(row, "root")


def test_how_rows_say_where_images_and_marks_are():
    talk = broken.turns("<image>\nhi", "yes")
    assert record(image="a.png", conversations=talk).images == ("root/a.png",)
    assert record(image=["a.png", "b.png"], conversations=broken.turns("hi", "yes")).images == (
        "root/a.png",
        "root/b.png",
    )
    assert record(image="", conversations=broken.turns("hi", "yes")).images == ()  # InternVL's rows of text alone
    assert record(video="", image="a.png", conversations=talk).images == ("root/a.png",)
    assert record(image={"bytes": b"x", "path": "a.png"}, conversations=talk).images == (b"x",)
    assert record(image="s3://b/a.png", conversations=talk).images == ("s3://b/a.png",)
    assert record(image="\ue000.png", conversations=talk).images == ("root/\ue000.png",)  # a name is not changed
    assert record(conversations=broken.turns("\ue000", "\uf8ff yes")).turns == (("\ue000", "\uf8ff yes"),)
    columns = {"from": ["human", "gpt"], "value": ["hi", "yes"]}
    assert record(conversations=columns).turns == (("hi", "yes"),)
    assert record(questions=["a", "b"], answers=["c", "d"]).turns == (("a", "c"), ("b", "d"))
    assert record(question="a", answers=["c", "d"]).turns == (("a", "c"),)
    people = record(question="a", answers=[{"answer": "c", "answer_id": 1}, {"answer": "d", "answer_id": 2}])  # VQAv2
    assert people.turns == (("a", "c"),) and people.references == (("c", "d"),)
    parts = [{"type": "image"}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    assert record(image="a.png", messages=messages).turns == ((f"{IMAGE_MARK}\nhi", "yes"),)


@pytest.mark.parametrize("width, height, sizes", [
    (3, 4, ((3, 4),)), ([3], [4], ((3, 4),)), (3.0, 4, ()), (True, 4, ()), (0, 4, ()), (-3, -4, ()), (10**12, 1, ()),
    (10**400, 10**400, ()), (float("nan"), 4, ()), ("3", "4", ()), (None, 4, ()), ([3, 3], [4, 4], ()), ([], [], ()),
    (10**5, 10**5, ()),
])  # fmt: skip
def test_a_stated_size_counts_where_it_can_be_one(width, height, sizes):
    row = dict(image="a.png", conversations=broken.turns("<image>", "yes"))
    assert record(**row, width=width, height=height).sizes == sizes
    assert record(**row, width_list=width, height_list=height).sizes == sizes


def learned(sample):
    return micro.tokenizer().decode(sample.tokens[sample.supervised], skip_special=False)


def shown(sample):
    return micro.tokenizer().decode(sample.tokens, skip_special=False).replace("<IMG_CONTEXT>", ".")


@pytest.mark.parametrize("row, expected", [
    (dict(image="", conversations=broken.turns("hi", "yes")), "user\nhi<|im_end|>"),
    (dict(image=[image_file(0)], conversations=broken.turns("hi", "yes")), "user\n<img>....</img>\nhi<|im_end|>"),
    (dict(image=[image_file(0)], conversations=broken.turns("a <image> b", "yes")),
     "user\na <img>....</img> b<|im_end|>"),
    (dict(image=[image_file(0)] * 2, conversations=broken.turns("hi", "yes")),
     "user\n<img>....</img>\n<img>....</img>\nhi<|im_end|>"),
    (dict(image=[image_file(0)] * 2, conversations=broken.turns("<image> or", "yes", "<image>?", "no")),
     "user\n<img>....</img> or<|im_end|><|im_start|>assistant\nyes<|im_end|><|im_start|>user\n<img>....</img>?"),
    (dict(conversations=[{"from": "system", "value": "be kind"}, *broken.turns("hi", "yes")]),
     "<s><|im_start|>system\nbe kind<|im_end|>"),
    (dict(image=[image_file(0)] * 2, caption="a dog"), "user\n<img>....</img>\ndescribe the picture.<|im_end|>"),
])  # fmt: skip
def test_internvl_s_rules_for_conversations(row, expected):
    sample = reader_of().make(parse(row), np.random.default_rng(0))
    assert expected in shown(sample)
    assert learned(sample) in ("yes<|im_end|>", "yes<|im_end|>no<|im_end|>", "a dog<|im_end|>")
    assert len(sample.tiles) == shown(sample).count("<img>")


@pytest.mark.parametrize("images, tiles", [(1, 13), (2, 7), (3, 5), (5, 3), (12, 1), (40, 1)])
def test_several_images_share_the_tiles(images, tiles):
    assert Tiling(32, 1, 12, True).shared_by(images).count(400, 100 * 12 // max(12 // images, 1)) <= tiles
    sample = reader_of(sequence_length=4000, tiles=100, max_tiles=12)
    row = dict(image=[broken.encoded(0, size=(96, 72))] * images, conversations=broken.turns("hi", "yes"))
    made = sample.make(parse(row), np.random.default_rng(0))
    expected = Tiling(32, 1, max(1, 12 // images), True).count(96, 72)
    assert len(made.tiles) == min(images * expected, 100) and expected <= tiles


# ---------------------------------------------------------------------------------------------------------------------
# What a sample takes, and where it is cut


def random_record(rng, files):
    """Up to 5 images at random places of up to 4 turns of random lengths."""
    images = [files[k] for k in rng.integers(0, len(files), rng.integers(0, 6))]
    count = int(rng.integers(1, 5))
    words = lambda most: " ".join(["what"] * int(rng.integers(0, most)))
    questions = [[words(12)] for _ in range(count)]
    if images and rng.random() < 0.8:
        for _ in images:
            questions[rng.integers(count)].append(IMAGE_MARK + words(4))
    turns = tuple((" ".join(q), f"a{i} " + words(12)) for i, q in enumerate(questions))
    return Record(tuple(images), (), turns)


def test_what_is_cut_is_never_an_image_and_never_all_that_is_learned():
    """Also: what a sample needs is told without making it."""
    rng = np.random.default_rng(0)
    files = [broken.encoded(i, size=size) for i, size in enumerate([(32, 32), (70, 32), (33, 90), (64, 64), (9, 9)])]
    tokenizer, outcomes = micro.tokenizer(), {"whole": 0, "cut": 0, "refused": 0}
    start, end, image_id = (tokenizer.special(token) for token in ("<img>", "</img>", "<IMG_CONTEXT>"))
    for _ in range(150):
        length, tiles = int(rng.integers(30, 200)), int(rng.integers(1, 12))
        samples = reader_of(sequence_length=length, tiles=tiles)
        record = random_record(rng, files)
        roomy = dataclasses.replace(samples, length=100_000, tiles=1000)
        whole, needs = roomy.make(record, rng), samples.needs(record)
        counts = [samples.tiling().shared_by(len(record.images)).count(w, h) for w, h in needs.sizes]
        assert len(whole.tokens) == needs.text + 4 * sum(counts) and len(whole.tiles) == sum(counts)
        first = needs.first + 4 * sum(counts[: needs.images_before])
        assert np.flatnonzero(whole.supervised)[0] == first - 1
        fits = first <= length and sum(counts[: needs.images_before]) <= tiles
        try:
            made = samples.make(record, rng)
        except BadSample as error:
            assert error.reason == "nothing_supervised" and not fits
            outcomes["refused"] += 1
            continue
        assert fits
        n = len(made.tokens)
        outcomes["whole" if n == len(whole.tokens) else "cut"] += 1
        assert n <= length and len(made.tiles) <= tiles and made.supervised.any()
        np.testing.assert_array_equal(made.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(made.supervised, whole.supervised[:n])
        np.testing.assert_array_equal(made.tiles, whole.tiles[: len(made.tiles)])
        assert (made.tokens == start).sum() == (made.tokens == end).sum()
        assert (made.tokens == image_id).sum() == 4 * len(made.tiles)
        assert not made.supervised[np.isin(made.tokens, (start, end, image_id))].any()
        answers = "".join(answer.strip() + "<|im_end|>" for _, answer in record.turns)
        assert answers.startswith(learned(made))
        if n < len(whole.tokens):  # as much as there is room for
            assert n == length or whole.tokens[n] == start
    assert min(outcomes.values()) > 10, outcomes


def test_parts_of_a_long_text_hold_each_token_once():
    samples = reader_of("pretrain", sequence_length=50)
    record = Record(text="a long text about nothing, " * 40)
    total = samples.needs(record).text
    parts = [samples.make(record, None, part).tokens for part in range(-(-(total - 1) // 49))]
    assert max(map(len, parts)) == 50 and all(a[-1] == b[0] for a, b in zip(parts, parts[1:]))
    assert sum(len(part) - 1 for part in parts) == total - 1
    with pytest.raises(BadSample, match="nothing_supervised"):
        samples.make(record, None, len(parts))
