"""The published sizes, in abstract: names, shapes and counts of the public checkpoints, nothing allocated."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from hovle_jax.formats import hovle, internvl
from hovle_jax.formats.mapping import nested, to_public
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.presets import hovle_model, internvit_300m
from hovle_jax.model.teacher import VisionTeacher
from tests.shared import checkpoint_keys, public_checkpoint

EXECUTION = Execution()


def abstract(module, *inputs, **static):
    """The parameters of a module as shapes."""
    init = lambda: nn.meta.unbox(module.init(jax.random.key(0), *inputs, **static)["params"])
    return jax.eval_shape(init)


def abstract_hovle(config):
    """{'embedding', 'llm'} of a row with one tile."""
    model, embedding = HoVLE(config, EXECUTION), config.embedding
    L, L_long = embedding.tokens_per_tile + 1, embedding.stack_tokens_per_tile + 1
    row, long_row = jnp.zeros((1, L), jnp.int32), jnp.zeros((1, L_long), jnp.int32)
    tiles = jnp.zeros((1, 1, embedding.image_size, embedding.image_size, 3), jnp.uint8)
    batch = {"tokens": row, "positions": row, "segment_ids": row, "image_positions": row[:, 1:], "tiles": tiles}
    if embedding.pixel_shuffle == "post":
        batch |= {f"long_{key}": long_row for key in ("tokens", "positions", "segment_ids")}
        batch |= {"long_image_positions": long_row[:, 1:], "long_text_positions": row}
    return {"embedding": abstract(model.embedding, batch), "llm": abstract(model.llm, row, row, row)}


def public_shapes(rules, params):
    """{public name: shape}."""
    return {name: x.shape for name, x in jax.eval_shape(lambda p: to_public(rules, p), params).items()}


@pytest.mark.parametrize("pixel_shuffle", ["pre", "post"])
def test_hovle_has_the_names_shapes_and_size_of_the_public_checkpoint(pixel_shuffle):
    config, public = hovle_model(pixel_shuffle), public_checkpoint("hovle")
    params = abstract_hovle(config)
    assert public_shapes(hovle.rules(config), params) == public["shapes"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameters == public["parameters"]
    assert 4 * parameters == public["total_size"]  # of the published index; float32


def test_internvl2_2b_and_internvit_300m_have_the_names_and_shapes_of_the_public_checkpoints():
    llm = hovle_model().llm
    config = internvl.InternVLConfig(vision=internvit_300m(), llm=llm)
    row, tiles = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 448, 448, 3), jnp.uint8)
    teacher = abstract(VisionTeacher(config.teacher, EXECUTION), tiles, tokens_per_tile=256)
    params = {"teacher": teacher, "llm": abstract(LanguageModel(llm, EXECUTION), row, row, row)}
    assert public_shapes(internvl.rules(config), params) == public_checkpoint("internvl2_2b")["shapes"]
    vision_rules = nested(internvl.vision_rules(config.vision), ours="vision")
    assert public_shapes(vision_rules, {"vision": teacher["vision"]}) == public_checkpoint("internvit300m")["shapes"]


PUBLIC = ("hovle", "internvl2_2b", "internvit300m")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_short_list_has_all_tensors_and_parameters(name):
    public = public_checkpoint(name)
    assert len(public["shapes"]) == public["tensors"]
    assert sum(map(math.prod, public["shapes"].values())) == public["parameters"]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_short_list_is_the_whole_one(name):
    assert public_checkpoint(name)["shapes"] == checkpoint_keys(name)
