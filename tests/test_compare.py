"""Runs side by side: the table, what differs, seeds; and the page of a whole chain."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hovle_jax import train
from hovle_jax.errors import UserError
from hovle_jax.report import chain, comparison, runs
from hovle_jax.training import loop
from tests.run_folders import write_chain, write_run

ROOT = pathlib.Path(__file__).parents[1]


def lines(text):
    """{first words of a line: its cells} of a table."""
    found = {}
    for line in text.splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        found[name] = cells
    return found


def test_two_runs_are_compared_by_what_they_gave_took_and_differ_in(tmp_path):
    write_run(tmp_path / "a", "instruct", results={"accuracy": 98.356}, seconds=3600)
    write_run(tmp_path / "b", "instruct", losses=(4.0, 2.0), results={"accuracy": 97.1}, learning_rate=1e-3)
    text = comparison.compare([tmp_path / "a", tmp_path / "b" / "instruct"], tmp_path)
    found = lines(text)
    assert found["instruct"] == ["a", "b/instruct"]
    assert found["loss (last 5% of its points)"] == ["1.000", "2.000"]
    assert found["accuracy"] == ["98.36%", "97.10%"]
    assert found["time"] == ["1:00:00", "0:01:00"] and found["parameters trained"] == ["1.9M", "1.9M"]
    assert found["optimizer.learning_rate"] == ["0.0004", "0.001"] and found["steps"] == ["3", "2"]
    assert "±" not in text and "optimizer.b1" not in found
    image = np.asarray(Image.open(tmp_path / "compare.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_runs_that_differ_by_seed_alone_get_a_mean_and_a_spread(tmp_path):
    for seed, accuracy in enumerate((90.0, 92.0, 97.0)):
        write_chain(tmp_path / "seeds" / f"seed_{seed}", seed, accuracy)
    write_chain(tmp_path / "other", 0, 50.0, learning_rate=9e-9)
    text = comparison.compare([tmp_path / "seeds", tmp_path / "other"], tmp_path / "out")
    tables = {table.splitlines()[0].split()[0]: lines(table) for table in text.split("\n\n")[:-1]}
    assert list(tables) == ["pretrain", "contrast", "distill", "align", "instruct"]
    found = tables["instruct"]
    assert found["instruct"] == ["seeds/seed_0", "seeds/seed_1", "seeds/seed_2", "mean ± sd of 3", "other"]
    # The sample standard deviation of 90, 92 and 97 is sqrt(13).
    assert found["accuracy"] == ["90.00%", "92.00%", "97.00%", "93.00% ± 3.61%", "50.00%"]
    # Its own config is that of seed 0; the stage that it starts from is another one.
    assert found["align.optimizer.learning_rate"][-1] == "9e-09" and "optimizer.learning_rate" not in found
    # Stages that the difference comes after are the same recipe: four runs, of which two have one seed.
    assert tables["pretrain"]["pretrain"][-1] == "mean ± sd of 4"
    assert (tmp_path / "out" / "compare.png").is_file()


def test_runs_of_one_recipe_have_one_colour(tmp_path, monkeypatch):
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", "contrast", seed=seed)
    write_run(tmp_path / "b", "contrast", b1=0.5)
    seen = {}
    monkeypatch.setattr(comparison, "plot_comparison", lambda panels, path, colors: seen.update(colors) or path)
    comparison.compare([tmp_path / name for name in ("a0", "a1", "b")], tmp_path)
    assert seen["a0"] == seen["a1"] != seen["b"]


def test_an_unfinished_run_is_compared_as_far_as_it_is(tmp_path):
    write_run(tmp_path / "a", "contrast", losses=(2.0,), steps=10)
    (tmp_path / "a" / "contrast" / "results.json").unlink()
    found = lines(comparison.compare([tmp_path / "a"], tmp_path))
    assert found["contrast"] == ["a"] and found["steps"] == ["1 of 10"]


def test_a_folder_without_runs_is_said(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"llm": {}}')  # an import's
    with pytest.raises(UserError, match=f"{tmp_path} has no run; give .*runs/instruct"):
        comparison.open_runs([tmp_path])
    with pytest.raises(UserError, match="no folder at /nowhere"):
        comparison.open_runs(["/nowhere"])


def test_the_command_says_how_it_is_called():
    command = [sys.executable, "-m", "hovle_jax.compare"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: usage: python -m hovle_jax.compare RUN RUN...")


# ---------------------------------------------------------------------------------------------------------------------
# The chain's page


def test_the_page_of_a_chain_has_its_stages_in_order_with_links_to_what_there_is(tmp_path):
    write_chain(tmp_path / "<runs>", accuracy=98.356)
    workdir = tmp_path / "<runs>"
    for stage in ("pretrain", "instruct"):
        (workdir / stage / "report.html").write_text("")
    Image.new("RGB", (4, 4)).save(workdir / "instruct" / "answers.png")
    text = chain.write_chain(workdir).read_text()
    stages = re.findall(r"<tr><td>(?:<a [^>]*>)?(\w+)", text)
    assert stages == ["pretrain", "contrast", "distill", "align", "instruct"]
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert [r for r in references if not r.startswith("data:")] == ["pretrain/report.html", "instruct/report.html"]
    assert "98.36% accuracy" in text and "held-out loss 5.000 → 0.500" in text and "0:05:00" in text
    assert "&lt;runs&gt;" in text and "<runs>" not in text and "http" not in text
    assert len([r for r in references if r.startswith("data:image/png")]) == 2


def test_the_page_tells_a_stage_that_is_not_finished(tmp_path):
    write_run(tmp_path, "contrast", steps=400)
    text = chain.write_chain(tmp_path).read_text()
    assert "not finished" in text and "3 of 400" in text
    assert chain.write_chain(tmp_path / "contrast") is None  # which holds no runs


def test_stages_that_start_from_each_other_end(tmp_path):
    for stage, source in (("align", "instruct"), ("instruct", "align")):
        folder = write_run(tmp_path, stage)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"init": {"llm": source}}))
    assert set(runs.runs_in(tmp_path)) == {"align", "instruct"}


def test_a_run_tells_what_it_was_made_of(tmp_path):
    about = runs.Run.read(write_run(tmp_path, "contrast", losses=(1.0,) * 20, seconds=10.0)).about()
    assert about["steps"] == "20 of 20" and about["parameters"] == "1,900,000 trained, 0 frozen"
    assert about["tokens seen"] == "20,000" and about["speed"] == "2.0k tokens a second while training"
    assert about["commit"] == "abc" and about["command"] == "c" and about["time"] == "0:00:10"


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def test_seeds_train_the_whole_chain_each_in_its_folder_and_compare(tmp_path, monkeypatch, capsys):
    from hovle_jax.evaluation import summary

    trained = []

    def run(config, folder, sources, say, profile, track, mirror):
        trained.append((str(folder.relative_to(tmp_path)), config.seed))
        write_run(folder.parent, config.stage, losses=(1.0 + config.seed,), seed=config.seed)
        (folder / "model").mkdir()
        return loop.Result(folder, config.steps, finished=True, held_out={})

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(summary, "summarize", lambda config, result, benchmark, track: {})
    config = train.stage_config(ROOT / "configs", "distill", "tiny")
    assert train.train_seeds(config, ROOT / "configs", tmp_path, 2) == 0
    stages = ("pretrain", "contrast", "distill")
    assert trained == [(f"seed_{seed}/{stage}", seed) for seed in (0, 1) for stage in stages]
    found = lines(capsys.readouterr().out)
    assert found["distill"] == ["seed_0", "seed_1", "mean ± sd of 2"]
    assert (tmp_path / "compare.png").is_file()


def test_seeds_on_several_hosts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    config = train.stage_config(ROOT / "configs", "contrast", "tiny")
    with pytest.raises(UserError, match="--seeds trains on one host"):
        train.train_seeds(config, ROOT / "configs", tmp_path, 2)


def test_seeds_stop_where_a_run_was_preempted(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *rest: 143)
    config = train.stage_config(ROOT / "configs", "contrast", "tiny")
    assert train.train_seeds(config, ROOT / "configs", tmp_path, 2) == 143
