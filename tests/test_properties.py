"""Properties of tiling, packing, templates and configs that hold for all values; hypothesis looks for exceptions."""

import dataclasses
import json
import string

import numpy as np
import pytest

from hovle_jax.config import ModelConfig, RunConfig, from_dict
from hovle_jax.data.images import Tiling, candidate_grids
from hovle_jax.data.rows.packing import pack
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.errors import UserError
from tests import bpe, micro

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # without those that look for a smaller one
bounded = hypothesis.settings(max_examples=30, derandomize=True, deadline=None, database=None, phases=phases)
few = hypothesis.settings(bounded, max_examples=8)  # of what takes long
tilings = st.builds(
    lambda size, fewest, more, thumbnail: Tiling(size, fewest, fewest + more, thumbnail),
    st.sampled_from([4, 8]), st.integers(1, 6), st.integers(0, 8), st.booleans(),
)  # fmt: skip
sides = st.integers(1, 40) | st.integers(1, 5000)


@bounded
@hypothesis.given(tilings, sides, sides)
def test_a_grid_is_one_of_the_candidates_and_none_is_nearer(tiling, width, height):
    grid = tiling.grid(width, height)
    candidates = candidate_grids(tiling.min_tiles, tiling.max_tiles)
    away = lambda columns, rows: abs(width / height - columns / rows)
    assert grid in candidates and away(*grid) == min(away(*c) for c in candidates)
    assert tiling.count(width, height) == grid[0] * grid[1] + (tiling.thumbnail and grid != (1, 1))


@bounded
@hypothesis.given(tilings, st.integers(1, 30), sides, sides)
def test_no_image_has_more_tiles_than_a_limit(tiling, limit, width, height):
    assert 1 <= tiling.within(limit).count(width, height) <= limit


@bounded
@hypothesis.given(tilings, st.integers(1, 60), st.integers(1, 60))
def test_tiles_are_as_many_as_counted(tiling, width, height):
    from PIL import Image

    tiles = tiling.cut(Image.new("RGB", (width, height), (10, 20, 30)))
    assert tiles.shape == (tiling.count(width, height), tiling.size, tiling.size, 3) and tiles.dtype == np.uint8
    assert (tiles == np.array([10, 20, 30])).all(), "a plain image has plain tiles"


@bounded
@hypothesis.given(st.data())
def test_rows_hold_each_sample_once_and_keep_their_budgets(data):
    tokens, tiles = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 8))
    needs = data.draw(st.lists(st.tuples(st.integers(0, tokens), st.integers(0, tiles)), max_size=40))
    samples = data.draw(st.integers(0, 4))
    asked = np.asarray(needs, np.int64).reshape(-1, 2)
    packing = pack(asked[:, 0], asked[:, 1], tokens, tiles, samples)
    rows = [packing.row(i) for i in range(len(packing))]
    assert sorted(int(i) for row in rows for i in row) == list(range(len(needs)))
    for row in rows:
        assert 1 <= len(row) <= (samples or len(needs))
        assert asked[row, 0].sum() <= tokens and asked[row, 1].sum() <= tiles
    assert not rows or rows[0][0] == 0, "the sample that has waited longest begins a row"


texts = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=30)
questions = texts.filter(lambda text: "<image>" not in text)
answers = texts.map(str.strip).filter(lambda text: text and "<image>" not in text)


@bounded
@hypothesis.given(st.lists(st.tuples(questions, answers), min_size=1, max_size=3))
def test_the_answers_and_their_ends_are_what_a_template_learns(turns):
    tokenizer = bpe.tokenizer()
    tokenizer.chat_template = bpe.CHATML
    encoded = encode_conversation(tokenizer, turns)
    learned = tokenizer.decode(encoded.tokens[encoded.supervised], skip_special=False)
    assert learned == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    starts = [i for i in encoded.tokens.tolist() if i == tokenizer.special("<|im_start|>")]
    assert len(starts) == 2 * len(turns), "no text of a user begins a turn"


def changed(config, data):
    """The config with other numbers, texts and flags of the same types."""
    values = {
        int: st.integers(-(2**40), 2**40),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(max_size=8),
    }
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = changed(value, data)
        elif type(value) in values and data.draw(st.booleans()):
            changes[field.name] = data.draw(values[type(value)])
    return dataclasses.replace(config, **changes)


@few
@hypothesis.given(st.data())
def test_configs_come_back_from_their_files(data):
    run = changed(micro.run_config("contrast"), data)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    model = changed(run.model_config, data)
    assert from_dict(ModelConfig, json.loads(json.dumps(dataclasses.asdict(model)))) == model


@bounded
@hypothesis.given(st.text(string.ascii_lowercase + "_", min_size=1, max_size=12), st.sampled_from(["", "optimizer"]))
def test_keys_that_are_not_known_are_named(key, part):
    content = micro.run_config("contrast").to_dict()
    place = content[part] if part else content
    hypothesis.assume(key not in place)
    place[key] = 1
    with pytest.raises(UserError, match=rf"config\.{f'{part}.' if part else ''}{key} is not a known key; did you mean"):
        RunConfig.from_dict(content)


@bounded
@hypothesis.given(st.data())
def test_values_of_another_type_are_refused(data):
    content = micro.run_config("contrast").to_dict()
    key = data.draw(st.sampled_from(["steps", "seed", "stage", "optimizer", "data"]))
    content[key] = data.draw(st.sampled_from([None, [1], 1.5, {"x": 1}, object()]))
    with pytest.raises(UserError, match=f"config.{key}"):
        RunConfig.from_dict(content)
