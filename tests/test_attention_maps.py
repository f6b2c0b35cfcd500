"""Attention maps: against a plain softmax in numpy, what is read off them, the figure, the command, the endpoint."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax.data.images import Tiling
from hovle_jax.errors import UserError
from hovle_jax.inference import attention_figure, attention_maps
from hovle_jax.inference.attention_maps import AttentionMaps, Cut, sparsity, usual_layers
from hovle_jax.inference.generate import Prompt, prompt_batch
from tests import micro
from tests.test_decode import make_answerer

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "pre": dict(variant="pre"),
    "post (HD)": dict(variant="post"),
    "normalized output": dict(variant="pre", normalize_output=True),
}
IMAGES = tuple(example.image for example in micro.examples()[3:5])
PROMPT = Prompt((("<image> or <image>?", "yes"), ("why?", None)), IMAGES)
ANSWER = "it is red"


# ---------------------------------------------------------------------------------------------------------------------
# The same in numpy


def plain_norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def plain_rotate(x, theta):
    """x [n, heads, C], half-split."""
    n, _, C = x.shape
    angle = np.arange(n)[:, None] * theta ** (-np.arange(0, C, 2) / C)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., : C // 2], x[..., C // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def plain_layer(x, params, c):
    """One decoder layer over x [n, D] -> (x, [n, n] attention, heads averaged)."""
    n, y = len(x), plain_norm(x, params["attention_norm"]["scale"], c.norm_eps)
    heads = lambda name, count: (y @ params[name]["kernel"]).reshape(n, count, c.head_dim)
    query, key = (plain_rotate(heads(*of), c.rope_theta) for of in (("query", c.num_heads), ("key", c.num_kv_heads)))
    value, maps, outs = heads("value", c.num_kv_heads), [], []
    for head in range(c.num_heads):
        of = head // (c.num_heads // c.num_kv_heads)
        scores = query[:, head] @ key[:, of].T / math.sqrt(c.head_dim)
        powers = np.exp(scores - scores.max()) * np.tri(n)
        maps.append(powers / powers.sum(-1, keepdims=True))
        outs.append(maps[-1] @ value[:, of])
    x = x + np.concatenate(outs, -1) @ params["output"]["kernel"]
    y = plain_norm(x, params["ffn_norm"]["scale"], c.norm_eps)
    gate = y @ params["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ params["up"]["kernel"])) @ params["down"]["kernel"], np.mean(maps, 0)


def plain_maps(answerer, sample):
    """[layers, n, n] of all layers, from the embedding's output on."""
    batch = prompt_batch(answerer, [sample])
    embedding = answerer.hovle.embedding.bind({"params": answerer.params["embedding"]})
    x = np.asarray(embedding.for_llm(embedding(batch)[0]), np.float64)[0]
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), answerer.params["llm"]["stack"]["layers"])
    maps = []
    for index in range(answerer.hovle.config.llm.stack.num_layers):
        params = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
        x, seen = plain_layer(x, params, answerer.hovle.config.llm.stack)
        maps.append(seen)
    return np.stack(maps)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_maps_are_those_of_a_plain_softmax(name):
    answerer = make_answerer(**VARIANTS[name])
    made = attention_maps.attention_maps(answerer, PROMPT, ANSWER)
    sample, start, images = attention_maps._answered(answerer.processor, PROMPT, ANSWER)
    assert made.layers == (0, 1) and start == made.answer
    assert answerer.tokenizer.decode(sample.tokens[start:]) == ANSWER == "".join(made.texts[start:])
    np.testing.assert_allclose(made.weights, plain_maps(answerer, sample), atol=2e-6)
    assert made.weights[0].std() > 1e-3  # far from uniform: a wrong rotation would be seen
    np.testing.assert_array_equal(made.is_image, sample.tokens == answerer.tokenizer.image_id)
    assert len(made.tiles) == 2 and made.images == images == (Cut(1, 1, False),) * 2


def test_some_layers_in_any_order_are_those_of_all():
    answerer = make_answerer()
    both = attention_maps.attention_maps(answerer, PROMPT, ANSWER)
    swapped = attention_maps.attention_maps(answerer, PROMPT, ANSWER, layers=[1, 0])
    np.testing.assert_allclose(swapped.weights, both.weights[::-1], atol=1e-6)
    assert usual_layers(24) == (0, 12, 23) and usual_layers(2) == (0, 1) and usual_layers(1) == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# What is read off them


def maps_of(weights, is_image, answer, tiles=1):
    is_image = np.asarray(is_image, bool)
    texts = tuple("i" if visual else "t" for visual in is_image)
    pixels = np.zeros((tiles, 2, 2, 3), np.uint8)
    images = (Cut(tiles, 1, False),)
    return AttentionMaps((0,), 1, np.asarray(weights, np.float32)[None], is_image, answer, texts, pixels, images)


def test_sparsity_is_none_of_equal_weights_and_whole_of_one():
    assert sparsity(np.full((3, 9), 0.02)) == pytest.approx(0)
    assert sparsity(np.eye(4)[:2] * 0.3) == pytest.approx(1)
    # Two of four: (2 - 2 / sqrt 2) / (2 - 1).
    assert sparsity([[0.5, 0.5, 0, 0]]) == pytest.approx(2 - math.sqrt(2))
    assert sparsity([[1, 0, 0, 0], [1, 1, 1, 1]]) == pytest.approx(0.5)
    assert sparsity(np.zeros((1, 4))) == 0


def test_rows_of_the_answer_are_those_that_made_it():
    """t i i i i t t | a a: the answer's two tokens were made by the last of the prompt and the first of the answer."""
    weights = np.arange(81).reshape(9, 9) / 81
    made = maps_of(weights, [0, 1, 1, 1, 1, 0, 0, 0, 0], 7)
    assert made.of_answer.shape == (1, 2, 1, 2, 2)
    np.testing.assert_allclose(made.of_answer[0, :, 0].reshape(2, 4), weights[6:8, 1:5], rtol=1e-6)
    assert made.text_after_images == slice(5, 9)
    assert made.image_share[0] == pytest.approx(weights[5:, 1:5].sum(1).mean())


def test_text_between_images_does_not_count():
    made = maps_of(np.tri(11) / 11, [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], 10, tiles=2)
    assert made.text_to_image.shape == (1, 2, 8) and made.sparsity[0] == pytest.approx(0)


@pytest.mark.parametrize("width, height", [(64, 64), (300, 100), (120, 400), (640, 480), (97, 61), (1000, 90)])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_a_cut_has_the_columns_of_the_tiling(width, height, thumbnail):
    tiling = Tiling(32, 1, 12, thumbnail)
    columns, rows = tiling.grid(width, height)
    made = Cut.of((width, height), tiling.count(width, height), thumbnail)
    assert made == Cut(columns * rows + (thumbnail and columns * rows > 1), columns, thumbnail and columns * rows > 1)


# ---------------------------------------------------------------------------------------------------------------------
# The figure


def test_the_answer_is_bright_where_it_looks():
    weights = np.asarray([[[0.0, 0.2], [0.8, 0.0]]])
    drawn = attention_figure.overlaid(np.full((1, 4, 4, 3), 200, np.uint8), weights)[0, :, :, 0]
    light = attention_figure.VISIBLE + (1 - attention_figure.VISIBLE) * 0.25**attention_figure.DARK
    dark = round(200 * attention_figure.VISIBLE)
    np.testing.assert_array_equal(drawn[::2, ::2], [[dark, round(200 * light)], [200, dark]])
    np.testing.assert_array_equal(drawn, np.repeat(np.repeat(drawn[::2, ::2], 2, 0), 2, 1))


def test_tiles_lie_as_in_their_images():
    tiles = np.arange(1, 9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 10, 10, 3), np.uint8)
    canvas = attention_figure._mosaic(tiles, (Cut(7, 3, True), Cut(1, 1, False)))
    wanted = [[1, 2, 3], [4, 5, 6], [7, 255, 255], [8, 255, 255]]
    np.testing.assert_array_equal(canvas[5::11, 5::11, 0], wanted)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_names_layers_tokens_and_numbers(tmp_path, ending):
    made = attention_maps.attention_maps(make_answerer(), PROMPT, "it costs $5 or $6")
    path = attention_figure.draw(made, tmp_path / f"maps.{ending}", "how much? $5 or $6")
    if ending == "png":
        assert min(Image.open(path).size) > 600
    else:
        drawn = path.read_text()
        named = ["layer 1 of 2: sparsity", f"layer 2 of 2: sparsity {made.sparsity[1]:.2f}", "how much? ", "answer"]
        assert all(f"<!-- {text}" in drawn for text in named)
        assert f"{100 * made.image_share[0]:.1f}% of the text" in drawn


MISTAKES = {
    "no image": (dict(prompt=Prompt.of("hello")), "give at least one image"),
    "no answer": (dict(answer=" "), "the answer is empty"),
    "no such layer": (dict(layers=[0, 2]), "there is no layer 3: the LLM has layers 1 to 2"),
    "too long": (dict(answer="word " * 300), "the model reads 512 in all"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    changes, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        attention_maps.attention_maps(make_answerer(), **({"prompt": PROMPT, "answer": ANSWER} | changes))


def test_an_llm_alone_has_none():
    answerer = make_answerer()
    hovle = dataclasses.replace(answerer.hovle, config=dataclasses.replace(answerer.hovle.config, embedding=None))
    with pytest.raises(UserError, match="an LLM alone"):
        attention_maps.attention_maps(dataclasses.replace(answerer, hovle=hovle), PROMPT, ANSWER)
