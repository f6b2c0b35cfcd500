"""Which stages a command trains, which finished ones it uses, and which it refuses as another config's."""

import dataclasses
import json
import pathlib

import pytest

from hovle_jax import train
from hovle_jax.errors import UserError
from hovle_jax.training import run_folder
from hovle_jax.training.checks import check_sources
from hovle_jax.training.stages import STAGES
from hovle_jax.training.weights import save_result
from tests import micro

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def config_of(stage, preset="tiny"):
    return train.stage_config(CONFIGS, stage, preset)


def finish(workdir, stage, preset="tiny", **changes):
    """A folder as a finished run of the stage leaves it, without weights."""
    folder = workdir / stage
    (folder / "model").mkdir(parents=True)
    run_folder.save_config(folder, dataclasses.replace(config_of(stage, preset), **changes))


def planned(workdir, stage, preset="tiny"):
    return [config.stage for config, *_ in train.plan(config_of(stage, preset), CONFIGS, workdir)]


def test_what_is_missing_is_trained_first(tmp_path):
    assert planned(tmp_path, "instruct") == ["pretrain", "contrast", "distill", "align", "instruct"]
    for stage in ("pretrain", "contrast", "distill"):
        finish(tmp_path, stage)
    assert planned(tmp_path, "instruct") == ["align", "instruct"]
    finish(tmp_path, "align")
    _, folder, sources = train.plan(config_of("instruct"), CONFIGS, tmp_path)[0]
    assert sources == {"llm": tmp_path / "align", "embedding": tmp_path / "align"} and folder == tmp_path / "instruct"


def test_a_preset_s_name_alone_makes_no_other_stage(tmp_path):
    """tiny and tiny_no_distill have the same pretrain stage: one of them serves both."""
    finish(tmp_path, "pretrain", "tiny")
    assert planned(tmp_path, "instruct", "tiny_no_distill") == ["align", "instruct"]


@pytest.mark.parametrize(
    "stage, preset, changes, asked, message",
    [
        ("align", "tiny", {}, "tiny_no_distill", "align holds a run with init.embedding='distill', not ''"),
        ("pretrain", "tiny", {"seed": 5}, "tiny", "pretrain holds a run with seed=5, not 0"),
        ("contrast", "tiny", {"steps": 10}, "tiny", "contrast holds a run with steps=10, not 400; .*use it as it is"),
    ],
)
def test_a_finished_stage_of_another_config_is_refused_by_what_differs(
    tmp_path, stage, preset, changes, asked, message
):
    finish(tmp_path, stage, preset, **changes)
    with pytest.raises(UserError, match=message):
        planned(tmp_path, "instruct", asked)


def test_a_run_may_start_from_a_finished_model(tmp_path):
    made = micro.run_config("instruct")
    save_result(tmp_path / "model", STAGES["instruct"], micro.params(made), made)
    config = train.start_from(config_of("instruct"), str(tmp_path / "model"))
    assert (config.init.llm, config.init.embedding) == (str(tmp_path / "model"),) * 2
    [(_, _, sources)] = train.plan(config, CONFIGS, tmp_path / "mine")
    assert sources == {"llm": tmp_path / "model", "embedding": tmp_path / "model"}
    assert train.start_from(config_of("align"), str(tmp_path / "model")).init.llm == str(tmp_path / "model")
    with pytest.raises(UserError, match="has nothing that contrast starts from: it needs clip"):
        train.start_from(config_of("contrast"), str(tmp_path / "model"))
    with pytest.raises(UserError, match="there is no folder"):
        train.start_from(config_of("instruct"), str(tmp_path / "nothing"))


def with_llm(config, **stack):
    llm = config.model.llm
    llm = dataclasses.replace(llm, stack=dataclasses.replace(llm.stack, **stack))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))


def write_model_config(folder, config):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(config.model_config)))


def test_a_source_that_computes_otherwise_is_refused_though_its_shapes_fit(tmp_path):
    config = micro.run_config("instruct")
    write_model_config(tmp_path, config)
    sources = {"llm": tmp_path, "embedding": tmp_path}
    assert check_sources(config, sources) == []
    with pytest.raises(UserError, match="trained with model.llm.stack.norm_eps=1e-05, not 1e-06; set --config.model"):
        check_sources(with_llm(config, norm_eps=1e-6), sources)
    (line,) = check_sources(with_llm(config, rope_theta=5e6), sources)
    assert line.startswith("model.llm.stack.rope_theta=5000000.0 changes the rotary positions of")


def test_a_teacher_is_compared_with_the_tower_that_it_comes_from(tmp_path):
    config = micro.run_config("distill")
    write_model_config(tmp_path, config)
    assert check_sources(config, {"teacher": tmp_path}) == []
    vision = dataclasses.replace(config.teacher.vision, activation="quick_gelu")
    other = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, vision=vision))
    with pytest.raises(UserError, match="teacher.vision.activation='gelu', not 'quick_gelu'"):
        check_sources(other, {"teacher": tmp_path})
