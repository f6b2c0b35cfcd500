"""The files of configs/."""

import dataclasses
import itertools
import json
import pathlib

import jax
import pytest

from hovle_jax import train
from hovle_jax.components import select
from hovle_jax.config import ModelConfig, RunConfig, from_dict
from hovle_jax.errors import UserError
from hovle_jax.recipes import PRESETS
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training import checks
from hovle_jax.training.stages import STAGES
from hovle_jax.training.tokenizer import choose_tokenizer
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STAGE_FILES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def test_each_stage_has_a_config_file():
    assert set(STAGE_FILES) == set(STAGES)


@pytest.mark.parametrize("stage, preset", [*itertools.product(STAGE_FILES, PRESETS)])
def test_each_config_resolves(stage, preset):
    sizes = PRESETS[preset]
    if {"pretrain": "llm", "contrast": "clip"}.get(stage) in sizes.public or sizes.only not in ("", stage):
        with pytest.raises(UserError, match=f"'{preset}' has no {stage} stage"):
            train.stage_config(CONFIGS, stage, preset)
        return
    config = train.stage_config(CONFIGS, stage, preset)
    assert (config.stage, config.preset) == (stage, preset)
    if preset.startswith("hovle") or sizes.published:
        with pytest.raises(UserError, match="--config.tokenizer.path=FILE"):
            choose_tokenizer(config, [CONFIGS], [], [])
    checks.check(config)
    assert RunConfig.from_dict(config.to_dict()) == config
    if not preset.startswith("hovle"):
        micro.run(config, make_mesh(config.mesh))


def test_unknown_presets_and_keys_are_named():
    with pytest.raises(UserError, match="unknown preset 'huge'; use one of tiny, "):
        train.stage_config(CONFIGS, "align", "huge")
    mapping = micro.run_config("align").to_dict()
    mapping["optimizer"]["learning_rat"] = mapping["optimizer"].pop("learning_rate")
    with pytest.raises(UserError, match="config.optimizer.learning_rat is not a known key; did you mean learning_rate"):
        RunConfig.from_dict(mapping)
    with pytest.raises(UserError, match="config.steps='many' should be of type int"):
        RunConfig.from_dict(micro.run_config("align").to_dict() | {"steps": "many"})


@pytest.mark.parametrize("stage, only_captioned", [("align", True), ("instruct", False)])
def test_configs_of_older_runs_are_read(stage, only_captioned):
    """Their `data` held what is easy-VQA's own, and which images `align` left out was not said at all."""
    new = train.stage_config(CONFIGS, stage, "tiny")
    assert new.easy_vqa.only_captioned == only_captioned
    old = new.to_dict()
    old["data"] |= {key: old["easy_vqa"][key] for key in ("balanced", "negated_share", "turns", "ask_caption")}
    del old["easy_vqa"]
    assert RunConfig.from_dict(json.loads(json.dumps(old))) == new
    assert "turns" in old["data"]  # the mapping that was given stays as it is
    with pytest.raises(UserError, match="config.data.turn is not a known key"):
        RunConfig.from_dict(old | {"data": old["data"] | {"turn": 1}})


def test_models_of_older_runs_are_tiled_as_internvl_does():
    old = micro.run_config("instruct").model_config.only(("embedding", "llm"))
    mapping = {k: v for k, v in dataclasses.asdict(old).items() if k not in ("min_tiles", "max_tiles", "thumbnail")}
    read = from_dict(ModelConfig, mapping)
    assert (read.min_tiles, read.max_tiles, read.thumbnail) == (1, 12, True) and read.embedding == old.embedding


@pytest.mark.parametrize("tiles, kept", [(1, (1, 1)), (2, (1, 1)), (5, (3, 4)), (99, (3, 9))])
def test_a_model_keeps_the_tiling_that_its_training_had(tiles, kept):
    run = micro.run_config("instruct", data={"tiles": tiles, "min_tiles": 3, "max_tiles": 9})
    model = run.model_config.only(("embedding", "llm"))
    assert (model.min_tiles, model.max_tiles) == kept and model.thumbnail
    assert model.with_max_tiles(None) == model and model.with_max_tiles(2).max_tiles == 2
    assert model.with_max_tiles(2).min_tiles == min(2, kept[0])


@pytest.mark.parametrize("preset", ["hovle", "hovle_hd"])
def test_full_size_state_in_abstract(preset):
    """Every stage of the paper's recipe: what is allocated, trained and frozen."""
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    totals = {}
    for stage in ("distill", "align", "instruct"):
        config = train.stage_config(CONFIGS, stage, preset)
        run = micro.run(config, make_mesh(config.mesh))
        assert run.placement.mesh.shape["fsdp"] == 8
        params = run.abstract_params()
        assert params.keys() == set(STAGES[stage].components_of(config.model_config))
        trains = lambda path, stage=stage, config=config: STAGES[stage].trains(path, config.model_config)
        totals[stage] = count(params), count(select(params, trains))
        largest = params["embedding"]["stack"]["layers"]["gate"]["kernel"]
        assert largest.sharding.shard_shape(largest.shape) == (8, 256, 8192)
    whole, table, class_token = 2_606_327_808, 92553 * 2048, 2 * 2048
    assert totals["align"][0] == totals["instruct"][0] == whole
    assert totals["instruct"][1] == whole - table - class_token
    assert totals["distill"][1] == totals["align"][1] == count(params["embedding"]) - class_token
