"""The files of configs/."""

import itertools
import pathlib

import jax
import pytest

from hovle_jax import train
from hovle_jax.components import select
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.recipes import PRESETS, no_stage
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
    if stage in no_stage(preset):
        with pytest.raises(UserError, match=f"'{preset}' has no {stage} stage"):
            train.stage_config(CONFIGS, stage, preset)
        return
    config = train.stage_config(CONFIGS, stage, preset)
    assert (config.stage, config.preset) == (stage, preset)
    if preset.startswith("hovle"):
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
