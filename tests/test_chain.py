"""Which stages a command trains, which finished ones it uses, and which it refuses as another config's."""

import dataclasses
import json
import os
import pathlib

import pytest

from hovle_jax import train
from hovle_jax.errors import UserError
from hovle_jax.evaluation import summary
from hovle_jax.system import file_lists
from hovle_jax.system.lock import locked
from hovle_jax.training import loop, run_folder
from hovle_jax.training.checks import check_sources
from hovle_jax.training.source_digests import check_same_sources, digest_of
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


# ---------------------------------------------------------------------------------------------------------------------
# Reports that are missing


@pytest.fixture
def made(monkeypatch):
    """What is made, in order, by stand-ins for training and scoring; `made.dies` kills the next scoring."""

    class Made(list):
        dies = False

    made = Made()

    def run(config, folder, sources, *rest):
        made.append(f"train {config.stage}")
        run_folder.save_config(folder, config)
        (folder / "model").mkdir()
        return loop.Result(folder, config.steps, True, {})

    def summarize(config, result, benchmark, track):
        made.append(f"score {config.stage}")
        (result.folder / "results.json").write_text("{}")
        if made.dies:
            made.dies = False
            raise KeyboardInterrupt
        (result.folder / "report.html").write_text("page")
        (result.folder.parent / "report.html").write_text("page of all")
        return {}

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(summary, "summarize", summarize)
    monkeypatch.setattr(summary, "write_chain", lambda workdir: made.append("page of all"))
    return made


def test_a_run_that_was_killed_in_its_report_gets_one(tmp_path, made):
    config = config_of("contrast")
    made.dies = True
    with pytest.raises(KeyboardInterrupt):
        train.train(config, CONFIGS, tmp_path, 0.0)
    assert train.train(config, CONFIGS, tmp_path, 0.0) == 0
    assert made == ["train contrast", "score contrast", "score contrast"]
    assert train.train(config, CONFIGS, tmp_path, 0.0) == 0
    assert len(made) == 3  # all is there
    (tmp_path / "report.html").unlink()
    assert train.train(config, CONFIGS, tmp_path, 0.0) == 0
    assert made[3:] == ["page of all"]


def test_a_report_of_a_stage_before_is_written_before_the_next_stage_is_trained(tmp_path, made, capsys):
    train.train(config_of("contrast"), CONFIGS, tmp_path, 0.0)
    (tmp_path / "contrast" / "report.html").unlink()
    made.clear()
    assert train.train(config_of("distill"), CONFIGS, tmp_path, 0.0) == 0
    assert made == ["score contrast", "train pretrain", "score pretrain", "train distill", "score distill"]
    assert "contrast is trained and has no report yet: writing it" in capsys.readouterr().out


def test_a_run_that_is_in_use_is_not_trained(tmp_path, made):
    (tmp_path / "contrast").mkdir()
    with locked(tmp_path / "contrast"), pytest.raises(UserError, match="contrast is in use by process"):
        train.train(config_of("contrast"), CONFIGS, tmp_path, 0.0)
    assert made == []


# ---------------------------------------------------------------------------------------------------------------------
# The weights that a run starts from


@pytest.fixture
def source(tmp_path):
    """A folder with a finished model of two components, as far as its files go."""
    for component in ("llm", "embedding"):
        (tmp_path / "align" / "model" / component / "d").mkdir(parents=True)
        (tmp_path / "align" / "model" / component / "d" / "0").write_bytes(component.encode() * 1000)
    return tmp_path / "align"


def test_a_run_does_not_go_on_from_other_weights(tmp_path, source):
    sources, folder = {"llm": source, "embedding": source}, tmp_path / "instruct"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    check_same_sources(folder, sources)
    check_same_sources(folder, sources)
    file = source / "model" / "embedding" / "d" / "0"
    content, times = file.read_bytes(), file.stat()
    file.write_bytes(content[:-1] + b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither its size nor its time tells
    with pytest.raises(UserError, match=f"the embedding weights in {source} are not those that {folder} began with"):
        check_same_sources(folder, sources)
    check_same_sources(folder, {"llm": source})
    moved = source.rename(tmp_path / "elsewhere")
    check_same_sources(folder, {"llm": moved})
    (folder / "checkpoints" / "3").rmdir()  # nothing was learned from the others yet
    check_same_sources(folder, {"llm": moved, "embedding": moved})


def test_a_models_own_list_of_digests_is_taken(source):
    """The list is believed, whatever the files are, so that nothing is read twice."""
    model = source / "model"
    assert len({digest_of(source, "llm"), digest_of(source, "embedding"), ""}) == 3
    digests = []
    for names in (("a", "b"), ("a", "c"), ("d", "c")):
        contents = {component: model / component / "listed" for component in ("llm", "embedding")}
        for path, content in zip(contents.values(), names):
            path.write_text(content)
        file_lists.write_list(model)
        for path in contents.values():
            path.write_text("changed since")
        digests.append(digest_of(source, "llm"))
    assert digests[0] == digests[1] != digests[2]


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
