"""Data: easy-VQA, tokenizer, packing, the longer stream of HD, batch = f(seed, step)."""

import dataclasses

import numpy as np
import pytest

from hovle_jax.config import EasyVQAConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.corpora.in_memory import MORE_WORDS, InMemoryCorpus, SampleMaker
from hovle_jax.data import pipeline
from hovle_jax.data.augmentation import shifted
from hovle_jax.data.batch import BatchShape, Sample, pack_row, stack
from hovle_jax.data.images import load_image
from hovle_jax.data.kinds import CONVERSATIONS, RANDOM_TEXT, TEXT
from hovle_jax.data.text.tokenizer import ADDED_TOKENS
from hovle_jax.errors import UserError
from hovle_jax.training import checks, loop
from hovle_jax.training.stages import STAGES
from tests import micro

# ---------------------------------------------------------------------------------------------------------------------
# easy-VQA


def no_to_all(words, but):
    return [(f"is there a {word} shape?", "no") for word in words if word not in but]


@pytest.mark.parametrize(
    "questions, caption",
    [
        ([("what color is the circle?", "red")], "a red circle"),  # a named shape in an open question is there
        ([("what color is the shape?", "teal"), ("what shape is present?", "triangle")], "a teal triangle"),
        ([("is a blue shape present?", "yes"), ("does the image contain a circle?", "yes")], "a blue circle"),
        ([("is there not a blue shape?", "no"), ("is no circle present?", "no")], "a blue circle"),  # negated
        ([("what color is the shape?", "red"), ("is there not a circle?", "yes")], ""),  # two shapes are left
        ([("is there a circle?", "no"), ("is no triangle present?", "yes"), ("what color is it?", "gray")],
         "a gray rectangle"),  # by elimination
        ([("what shape is it?", "circle"), *no_to_all(easy_vqa.COLORS, ["green"])], "a green circle"),
        ([("what shape is it?", "circle"), *no_to_all(easy_vqa.COLORS, ["green", "red"])], ""),
        ([("what shape is it?", "circle"), ("is there a red shape?", "no")], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_caption_deduction(questions, caption):
    assert easy_vqa.deduce_caption(questions) == caption


@pytest.mark.parametrize("split, examples, questions, open_captions", [
    ("train", 4000, 38_575, 422), ("test", 1000, 9_673, 112),
])  # fmt: skip
def test_the_real_corpus(split, examples, questions, open_captions):
    loaded = easy_vqa.load(split)
    assert [p.index for p in loaded] == list(range(examples))
    assert sum(len(p.questions) for p in loaded) == questions
    assert sum(not p.caption for p in loaded) == open_captions
    assert {p.caption for p in loaded} == {*easy_vqa.CAPTIONS, ""}
    assert all(p.image.shape == (64, 64, 3) and p.image.dtype == np.uint8 for p in loaded)
    for example in loaded:  # a caption never contradicts a direct answer
        for _, answer in example.questions:
            assert answer in ("yes", "no") or not example.caption or answer in example.caption.split()


def test_the_test_split_is_never_trained_on(tmp_path):
    config = micro.run_config("instruct", data={"split": "test"})
    with pytest.raises(UserError, match="data.split='test'.*'train' split alone"):
        loop.run(config, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no split 'validation'; use one of train, test"):
        easy_vqa.load("validation")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize("text", ["what color is the shape?", "  two  spaces \n\n", "🙂 你好, naïve\t✓", "", "a\nb"])
def test_tokenizer_round_trip(text):
    tokenizer = micro.tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.first_special for i in ids)
    assert type(tokenizer)(tokenizer.model).encode(text) == ids


def test_tokenizer_ids():
    tokenizer = micro.tokenizer()
    assert tokenizer.vocab_size == micro.VOCAB == tokenizer.first_special + len(ADDED_TOKENS)
    assert [tokenizer.special(t) for t in ADDED_TOKENS] == list(range(tokenizer.first_special, micro.VOCAB))
    assert tokenizer.stop_ids == (tokenizer.special("<|im_end|>"), tokenizer.special("</s>"))
    ids = [tokenizer.bos, *tokenizer.encode("yes"), tokenizer.special("<|im_end|>")]
    assert tokenizer.decode(ids) == "yes" and tokenizer.decode(ids, skip_special=False) == "<s>yes<|im_end|>"
    role = tokenizer.encode("user\nwhat")
    assert role[: len(tokenizer.encode("user\n"))] == tokenizer.encode("user\n")


# ---------------------------------------------------------------------------------------------------------------------
# Packing

IMAGE_ID, SIDE = 9, 2


def sample(tokens, supervised, first_pixel=0):
    """A sample whose tiles are filled with first_pixel, first_pixel + 1, ...; 4 image tokens a tile."""
    tokens = np.asarray(tokens, np.int32)
    count = int((tokens == IMAGE_ID).sum()) // 4
    tiles = np.arange(first_pixel, first_pixel + count, dtype=np.uint8)[:, None, None, None]
    tiles = np.broadcast_to(tiles, (count, SIDE, SIDE, 3))
    return Sample(tokens, np.asarray(supervised, bool), tiles)


SAMPLES = [
    sample([1, 9, 9, 9, 9, 3, 4], [0, 0, 0, 0, 0, 0, 1], first_pixel=10),
    sample([1, 5, 6], [1, 1, 1]),  # its first token is supervised and must not be predicted from the sample before
    sample([1, 9, 9, 9, 9, 7, 9, 9, 9, 9, 8], [0] * 5 + [1] + [0] * 4 + [1], first_pixel=20),
]


def shape(length=24, tiles=4, expansion=1):
    return BatchShape(length, tiles, SIDE, tokens_per_tile=4, expansion=expansion, image_id=IMAGE_ID)


def test_pack_row():
    row = pack_row(SAMPLES, shape())
    stream = row.short
    assert stream.tokens.tolist() == [*np.concatenate([s.tokens for s in SAMPLES]), 0, 0, 0]
    assert stream.segment_ids.tolist() == [1] * 7 + [2] * 3 + [3] * 11 + [0] * 3
    assert stream.positions.tolist() == [*range(7), *range(3), *range(11), 0, 0, 0]
    assert stream.image_positions.tolist() == [1, 2, 3, 4, 11, 12, 13, 14, 16, 17, 18, 19] + [24] * 4
    assert row.tiles[:, 0, 0, 0].tolist() == [10, 20, 21, 0]
    # place -> what is learned there; nothing across a border (6 -> 7, 9 -> 10)
    expected = {5: 4, 7: 5, 8: 6, 14: 7, 19: 8}
    assert {int(i): int(row.targets[i]) for i in np.flatnonzero(row.loss_weights)} == expected
    assert not row.targets[row.loss_weights == 0].any()


def test_a_row_that_does_not_fit_says_what_would():
    with pytest.raises(UserError, match="3 sample.* of 21 tokens .* data.sequence_length=20; set it to at least 21"):
        pack_row(SAMPLES, shape(length=20))
    with pytest.raises(UserError, match="3 image tiles .* data.tiles=2; raise it to 3"):
        pack_row(SAMPLES, shape(tiles=2))
    broken = dataclasses.replace(SAMPLES[0], tiles=SAMPLES[0].tiles[:0])
    with pytest.raises(UserError, match="4 image tokens for 0 tiles of 4 tokens each"):
        pack_row([broken], shape())


def long_stream_token_by_token(row, k):
    """The long stream as lists, one token after another."""
    long = {name: [] for name in ("tokens", "positions", "segment_ids")}
    image, text, in_segment = [], {}, {}
    for place, (token, segment) in enumerate(zip(row.tokens.tolist(), row.segment_ids.tolist())):
        if segment == 0:
            continue
        if token == IMAGE_ID:
            image += range(len(long["tokens"]), len(long["tokens"]) + k)
        else:
            text[place] = len(long["tokens"])
        for _ in range(k if token == IMAGE_ID else 1):
            long["tokens"].append(token)
            long["segment_ids"].append(segment)
            long["positions"].append(in_segment.get(segment, 0))
            in_segment[segment] = in_segment.get(segment, 0) + 1
    return long, image, text


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1], [1, 2]])
def test_long_stream(order):
    s = shape(expansion=4)
    row = pack_row([SAMPLES[i] for i in order], s)
    long, image, text = long_stream_token_by_token(row.short, 4)
    padding = s.long_length - len(long["tokens"])
    for name, values in long.items():
        assert getattr(row.long, name).tolist() == values + [0] * padding, name
    unused = len(row.long.image_positions) - len(image)
    assert row.long.image_positions.tolist() == image + [s.long_length] * unused
    assert row.long_text_positions.tolist() == [text.get(i, s.long_length) for i in range(s.length)]


def test_long_stream_has_room_for_a_full_row():
    s = shape(length=21, tiles=3, expansion=4)
    assert s.long_length == 21 + 3 * 12 and (pack_row(SAMPLES, s).long.segment_ids > 0).all()


def test_a_row_has_what_the_kind_of_batch_needs():
    s = shape()
    language = {"tokens", "positions", "segment_ids"}
    images = stack([CONVERSATIONS.row(SAMPLES, s)])
    assert images.keys() == language | {"targets", "loss_weights", "tiles", "image_positions"}
    long = {f"long_{name}" for name in (*language, "image_positions", "text_positions")}
    assert CONVERSATIONS.row(SAMPLES, shape(expansion=4)).keys() == images.keys() | long
    assert images["tokens"].shape == (1, 24)
    distill = stack([RANDOM_TEXT.row([sample], s) for sample in SAMPLES])
    assert distill.keys() == language | {"tiles", "image_positions", "image_weights", "text_weights"}
    assert distill["image_weights"].sum(1).tolist() == [4, 0, 8]
    assert distill["text_weights"].sum(1).tolist() == [1, 3, 2]
    assert TEXT.row(SAMPLES, s).keys() == language | {"targets", "loss_weights"}


# ---------------------------------------------------------------------------------------------------------------------
# batch = f(seed, step)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def assert_differ(first, second):
    assert any((first[name] != second[name]).any() for name in first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_depends_on_seed_and_step_alone(stage):
    config = micro.run_config(stage)
    built = micro.dataset(config)
    at_5 = built[5]
    iterator = built.iterate(5)
    assert_same(at_5, next(iterator)[0])
    assert_same(micro.dataset(config)[6], next(iterator)[0])
    assert_differ(at_5, built[6])
    assert_differ(at_5, micro.dataset(dataclasses.replace(config, seed=1))[5])


def test_an_epoch_has_each_image_once_and_the_next_one_another_order():
    built = micro.dataset(micro.run_config("contrast", data={"augment": False}))
    rows = [
        [tuple(row) for step in epoch for row in built[step]["tokens"].tolist()] for epoch in ((0, 1, 2), (3, 4, 5))
    ]
    assert len(set(rows[0])) == 24 and set(rows[0]) == set(rows[1]) and rows[0] != rows[1]


def test_images_stay_with_their_text():
    config = micro.run_config(
        "align", data={"augment": False}, easy_vqa=EasyVQAConfig(turns=0, ask_caption=True, only_captioned=True)
    )
    batch = micro.dataset(config)[0]
    for tokens, weights, tiles in zip(batch["targets"], batch["loss_weights"], batch["tiles"]):
        caption = micro.tokenizer().decode(tokens[weights > 0])
        example = next(p for p in micro.examples() if p.caption == caption)
        np.testing.assert_array_equal(tiles[0], example.image)


def test_held_out_data_is_not_augmented():
    config = micro.run_config("distill")
    kind = STAGES[config.stage].batch
    held_out, *_ = pipeline.build_held_out(config, kind, micro.tokenizer(), micro.corpus())
    originals = {p.image.tobytes() for p in micro.examples()}
    assert all(tile.tobytes() in originals for tile in held_out["tiles"][:, 0])
    assert any(tile.tobytes() not in originals for tile in micro.dataset(config)[0]["tiles"][:, 0])


def test_augment():
    image = micro.draw("red", "triangle")
    copies = [shifted(image, np.random.default_rng(seed), 4) for seed in range(16)]
    for seed, copy in enumerate(copies):
        assert copy.shape == image.shape and copy.dtype == np.uint8
        np.testing.assert_array_equal(copy, shifted(image, np.random.default_rng(seed), 4))
        # The shape lies inside, so moving it neither cuts it off nor adds to it.
        assert (copy != 255).any(-1).sum() == (image != 255).any(-1).sum()
    assert sum((copy != image).any() for copy in copies) >= 14
    assert len({copy.tobytes() for copy in copies}) >= 12


def test_images_become_square_tiles(tmp_path):
    from PIL import Image

    Image.fromarray(micro.draw("blue", "circle")[:16]).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png")
    assert image.size == (32, 16)
    with pytest.raises(UserError, match="no image at .*absent.png"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="text.png cannot be read as an image"):
        load_image(tmp_path / "text.png")


def test_reply_kinds_follow_what_is_affirmed_not_the_word():
    assert easy_vqa.reply_kind("is there a red shape?", "yes") == "affirmed"
    assert easy_vqa.reply_kind("is there not a circle?", "yes") == "denied"
    assert easy_vqa.reply_kind("is no circle present?", "no") == "affirmed"
    assert easy_vqa.reply_kind("what color is the shape?", "red") == "open"


def named_by(question):
    """What a question names: 'colour', 'shape' or nothing."""
    words = question.rstrip("?").split()
    kinds = {"colour": easy_vqa.COLORS, "shape": easy_vqa.SHAPES}
    return next((kind for kind, values in kinds.items() if set(words) & set(values)), "")


def drawn_questions(batches):
    """[(question, answer)] of batches of single questions, by their text."""
    found = []
    for batch in batches:
        for tokens, weights, targets in zip(batch["tokens"], batch["loss_weights"], batch["targets"]):
            text = micro.tokenizer().decode(tokens)
            question = text.split("user\n")[1].split("assistant\n")[0].strip()
            found.append((question, micro.tokenizer().decode(targets[weights > 0])))
    return found


def test_balanced_questions_do_not_give_their_answer_away():
    """Whether a thing is there does not depend on what is named; in the corpus as it is, it does."""
    examples = [p for p in easy_vqa.load("train") if p.caption][:400]
    drawn = {}
    for balanced in (True, False):
        data, choice = {"augment": False, "batch_size": 100}, EasyVQAConfig(balanced=balanced)
        config = micro.run_config("instruct", data=data, easy_vqa=choice)
        dataset = pipeline.build_dataset(
            config, STAGES[config.stage].batch, micro.tokenizer(), InMemoryCorpus(examples)
        )
        drawn[balanced] = drawn_questions(dataset[i] for i in range(10))
    for thing in ("colour", "shape"):
        for negated in (True, False):
            share = {}
            for balanced, pairs in drawn.items():
                asked = [p for p in pairs if named_by(p[0]) == thing and easy_vqa.is_negated(p[0]) == negated]
                kinds = [easy_vqa.reply_kind(*pair) for pair in asked if pair[1] in ("yes", "no")]
                share[balanced] = kinds.count("affirmed") / len(kinds)
            assert share[True] == pytest.approx(0.4, abs=0.05)
            assert thing == "shape" or share[False] < 0.25


def test_an_open_question_may_be_the_only_kind():
    pairs = (("what color is the shape?", "red"),)
    examples = [dataclasses.replace(p, questions=pairs) for p in micro.examples()]
    ((weight, group),) = easy_vqa.balance_groups(examples, 0.5)
    assert weight > 0 and group == examples


def test_several_questions_are_different_ones():
    config = micro.run_config("instruct", easy_vqa=EasyVQAConfig(turns=3))
    maker = SampleMaker(config, micro.tokenizer(), list(micro.examples()), False)
    example, rng = micro.examples()[0], np.random.default_rng(0)
    drawn = [maker.questions(example, rng) for _ in range(20)]
    assert all(len(turns) == len(set(turns)) == 3 and set(turns) <= set(example.questions) for turns in drawn)
    assert len({tuple(turns) for turns in drawn}) > 5


def test_a_balanced_conversation_begins_with_the_question_that_was_drawn():
    config = micro.run_config("instruct", easy_vqa=EasyVQAConfig(turns=2, balanced=True))
    maker = SampleMaker(config, micro.tokenizer(), list(micro.examples()), False)
    groups = easy_vqa.balance_groups(micro.examples(), negated_share=0.25)
    rng = np.random.default_rng(0)
    for _, examples in groups:
        first, second = maker.questions(examples[0], rng)
        assert first == examples[0].questions[0] and second in examples[0].questions[1:]
    plain = easy_vqa.balance_groups(micro.examples(), negated_share=0.0)
    assert len(plain) < len(groups)
    assert not any(easy_vqa.is_negated(p.questions[0][0]) for _, examples in plain for p in examples)


def test_conversations_end_with_the_caption_where_it_is_known():
    config = micro.run_config("instruct", easy_vqa=EasyVQAConfig(ask_caption=True))
    maker = SampleMaker(config, micro.tokenizer(), list(micro.examples()), False)
    example, rng = micro.examples()[0], np.random.default_rng(0)
    decode = lambda s: micro.tokenizer().decode(s.tokens[s.supervised], skip_special=False)
    answers = decode(maker.shown(example, rng)).split("<|im_end|>")
    assert len(answers) == 3 and answers[1] == example.caption
    unknown = decode(maker.shown(dataclasses.replace(example, caption=""), rng)).split("<|im_end|>")
    assert len(unknown) == 2 and unknown[0] in [a for _, a in example.questions]


def test_a_described_image_has_its_words_in_the_image_s_place():
    tokenizer, example = micro.tokenizer(), micro.examples()[0]
    maker = SampleMaker(micro.run_config("pretrain"), tokenizer, list(micro.examples()), False)
    words, counts, orders = tokenizer.encode(example.caption), set(), set()
    for seed in range(60):
        sample = maker.described(
            [example.questions[0]], example.caption, seed % (MORE_WORDS + 1), np.random.default_rng(seed)
        )
        tokens = sample.tokens.tolist()
        told = tokens[tokens.index(tokenizer.special("<img>")) + 1 : tokens.index(tokenizer.special("</img>"))]
        assert set(told) == set(words) and not len(sample.tiles)
        counts.add(len(told) - len(words))
        orders.add(tuple(dict.fromkeys(told)))
    assert counts == set(range(MORE_WORDS + 1)) and len(orders) > 3
    assert tokenizer.decode(sample.tokens[sample.supervised]) == example.questions[0][1]


def test_only_captioned_leaves_out_images_whose_caption_is_not_known():
    examples = [dataclasses.replace(p, caption=p.caption * (p.index % 2)) for p in micro.examples()]
    found = {}
    for only in (True, False):
        config = micro.run_config("instruct", easy_vqa=EasyVQAConfig(only_captioned=only))
        _, found[only] = InMemoryCorpus(examples).rows(config, CONVERSATIONS, micro.tokenizer())
    assert (found[True].samples, found[False].samples) == (12, 24)
    assert InMemoryCorpus(examples).rows(micro.run_config("pretrain"), TEXT, micro.tokenizer())[1].samples == 12


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"turns": 0, "ask_caption": True}, "easy_vqa.turns=0 leaves nothing"),
        ({"turns": 0, "only_captioned": True}, "easy_vqa.turns=0 leaves nothing"),
        ({"negated_share": 1.5}, "easy_vqa.negated_share=1.5 is a share"),
    ],
)
def test_conversations_that_cannot_be_are_refused(choice, message):
    with pytest.raises(UserError, match=message):
        checks.check(micro.run_config("align", easy_vqa=EasyVQAConfig(**choice)))
    checks.check(micro.run_config("align", easy_vqa=EasyVQAConfig(turns=0, ask_caption=True, only_captioned=True)))


def test_a_kind_says_what_it_demands_of_a_config():
    with pytest.raises(UserError, match="data.random_tokens=0 leaves no text"):
        checks.check(micro.run_config("distill", data={"random_tokens": 0}))
    with pytest.raises(UserError, match="data.sequence_length=600 exceeds the LLM's 512 positions"):
        checks.check(micro.run_config("align", data={"sequence_length": 600}))
    with pytest.raises(UserError, match="captions need the sizes of two towers"):
        checks.check(micro.run_config("contrast", clip=None))
    checks.check(micro.run_config("contrast", data={"sequence_length": 600}))  # which it does not read


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["pre", "post"])
def test_an_empty_row_has_the_fields_shapes_and_types_of_a_run_s_rows(stage, variant):
    config = micro.run_config(stage, variant)
    batch, row = micro.dataset(config)[0], STAGES[stage].batch.empty_row(config)
    assert {name: (a.shape[1:], a.dtype) for name, a in batch.items()} == {
        name: (a.shape, a.dtype) for name, a in row.items()
    }


def test_easy_vqa_refuses_a_kind_of_batch_that_it_does_not_give():
    class Other(type(TEXT)):
        pass

    with pytest.raises(UserError, match="easy_vqa gives no batches of rewards; set data.source"):
        micro.corpus().rows(micro.run_config("align"), Other("rewards"), micro.tokenizer())
