"""The commands as a user meets them: a mistake is one line on stderr; the chain of stages works."""

import json
import os
import pathlib

import numpy as np
import pytest

from hovle_jax import train
from hovle_jax.training import run_folder
from tests import forked, micro

ROOT = pathlib.Path(__file__).parents[1]


def environment(**variables):
    """Of a command on one CPU device; compiled quickly, as by conftest's fixture."""
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return {**os.environ, **fixed, **variables}


def command(name, *arguments, timeout=180, said=None, **variables):
    """Runs `python -m hovle_jax.NAME`, with `said` on its standard input."""
    return forked.run(f"hovle_jax.{name}", arguments, ROOT, environment(**variables), said, timeout)


@pytest.fixture
def files(tmp_path):
    """A picture, a file where a folder is needed, and the folder of a run with another seed."""
    from PIL import Image

    Image.fromarray(micro.draw("red", "circle")).save(tmp_path / "picture.png")
    (tmp_path / "file").touch()
    (tmp_path / "other" / "pretrain").mkdir(parents=True)
    config = train.stage_config(ROOT / "configs", "pretrain", "tiny")
    run_folder.save_config(tmp_path / "other" / "pretrain", config)
    return tmp_path


MISTAKES = {
    "unknown key": (
        "train --config configs/pretrain.py --workdir TMP/w --config.optimizer.learning_rat=1e-4",
        ["unknown config key", "learning_rate"],
    ),
    "key by its initials": (
        "train --config configs/pretrain.py --workdir TMP/w --config.optimizer.lr=1e-4",
        ["unknown config key 'optimizer.lr'", "did you mean --config.optimizer.learning_rate?"],
    ),
    "key without its section": (
        "train --config configs/pretrain.py --workdir TMP/w --config.learning_rate=1e-4",
        ["did you mean --config.optimizer.learning_rate?"],
    ),
    "key as a flag": (
        "train --config configs/pretrain.py --workdir TMP/w --learning_rate=1e-4",
        ["unknown flag --learning_rate", "did you mean --config.optimizer.learning_rate?"],
    ),
    "key like no other": (
        "prepare preview --config configs/pretrain.py --config.zzz=1", ["unknown config key 'zzz'", "--show"]
    ),
    "no rows": (
        "train --config configs/pretrain.py --workdir TMP/w --config.data.batch_size=0", ["data.batch_size=0 must be"]
    ),
    "rate below 0": (
        "train --config configs/pretrain.py --workdir TMP/w --config.optimizer.learning_rate=-1",
        ["optimizer.learning_rate=-1.0 must be 0 or more"],
    ),
    "seed below 0": ("train --config configs/pretrain.py --workdir TMP/w --config.seed=-1", ["seed=-1 must be from 0"]),
    "no rows to decode": (
        "aot --config configs/instruct.py --topology v5e-4 --program decode --config.data.batch_size=0",
        ["data.batch_size=0 must be at least 1"],
    ),
    "remote work folder": (
        "train --config configs/pretrain.py --workdir nosuch://bucket/runs",
        ["nosuch://bucket/runs cannot be opened", "pip install gcsfs"],
    ),
    "remote checkpoint": (
        "generate --checkpoint gs://bucket/runs/instruct --prompt hi", ["--checkpoint=gs://bucket/runs/instruct"]
    ),
    "remote checkpoint to score": ("evaluate --checkpoint s3://bucket/runs/instruct", ["--checkpoint=s3://bucket"]),
    "image by URL": (
        "generate --checkpoint TMP/w --image https://example.org/a.png --prompt hi",
        ["https://example.org/a.png", "URLs are not read"],
    ),
    "draws of a search": (
        "generate --checkpoint TMP/w --prompt hi --beams 4 --top_p 0.9 --stop x",
        ["--beams=4 looks for the likeliest answer: leave out --stop and --top_p"],
    ),
    "no question": ("generate --checkpoint TMP/w", ["--prompt is missing"]),
    "maps of no image": ("attention --checkpoint TMP/w --prompt hi", ["--image is missing"]),
    "maps as a text": (
        "attention --checkpoint TMP/w --prompt hi --image TMP/picture.png --output TMP/maps.txt",
        ["--output=TMP/maps.txt", ".png, .pdf, .svg"],
    ),
    "maps without a folder": (
        "attention --checkpoint TMP/w --prompt hi --image TMP/picture.png --output TMP/absent/maps.png",
        ["there is no folder TMP/absent"],
    ),
    "unknown preset": ("train --config configs/pretrain.py:huge --workdir TMP/w", ["'huge'", "tiny", "hovle_hd"]),
    "no config": ("train --workdir TMP/w", ["--config is missing"]),
    "absent config": ("train --config configs/absent.py", ["configs/absent.py"]),
    "value of another type": ("train --config configs/pretrain.py --config.steps=many", ["steps"]),
    "steps to trace that are none": (
        "train --config configs/pretrain.py --workdir TMP/w --profile=15:10", ["--profile='15:10'", "FIRST:LAST"]
    ),
    "steps to trace after the last": (
        "train --config configs/pretrain.py --workdir TMP/w --config.steps=9 --profile=5:10", ["--profile=5:10", "0:9"]
    ),
    "another seed": (
        "train --config configs/pretrain.py --workdir TMP/other --config.seed=5",
        ["TMP/other/pretrain", "seed=0, not 5", "--workdir"],
    ),
    "no folder can be made": (
        "train --config configs/pretrain.py --workdir TMP/file/x",
        ["cannot write to TMP/file/x"],
    ),
    "weights of the paper": (
        "train --config configs/align.py:hovle --workdir TMP/w", ["llm weights", "--config.init.llm=DIR"]
    ),
    "absent image": (
        "generate --checkpoint TMP/w --image TMP/absent.png --prompt hi", ["no image at TMP/absent.png", "--image"]
    ),
    "more marks than images": (
        "generate --checkpoint TMP/w --image TMP/picture.png --prompt <image><image>?",
        ["2 <image> marks and 1 image was given"],
    ),
    "no run": (
        "generate --checkpoint TMP --image TMP/picture.png --prompt hi", ["TMP holds no finished model", "runs/"]
    ),
    "unfinished run": ("evaluate --checkpoint TMP/other/pretrain", ["TMP/other/pretrain holds no finished model"]),
    "unknown benchmark": ("evaluate --checkpoint TMP --benchmark mmlu", ["'mmlu'", "easy_vqa_zero_shot"]),
    "unknown scorer": ("evaluate --checkpoint TMP --data rows.jsonl --scorer bleu", ["'bleu'", "exact, relaxed, anls"]),
    "absent data": ("evaluate --checkpoint TMP --data TMP/rows.jsonl", ["no file at TMP/rows.jsonl"]),
    "public benchmark without a file": ("evaluate --checkpoint TMP --benchmark pope", ["pope", "--tsv FILE.tsv"]),
    "file without a benchmark": ("evaluate --checkpoint TMP --tsv POPE.tsv", ["--tsv needs --benchmark"]),
    "absent TSV": ("evaluate --checkpoint TMP --benchmark pope --tsv TMP/a.tsv", ["no TSV file at TMP/a.tsv"]),
    "rules without a file": ("evaluate --checkpoint TMP --rules internvl", ["--rules is for --tsv"]),
    "scorer of a benchmark": ("evaluate --checkpoint TMP --scorer anls", ["--scorer is for --data"]),
    "length of a benchmark's answers": ("evaluate --checkpoint TMP --max_new_tokens=9", ["--max_new_tokens is for"]),
    "unknown action": ("evaluate zero --checkpoint TMP", ["unexpected argument 'zero'", "one of zeroshot, shift"]),
    "flag of another action": (
        "evaluate zeroshot --checkpoint TMP --baseline a.csv", ["--baseline is not for zeroshot, but for shift"]
    ),
    "classes of questions": ("evaluate --checkpoint TMP --label a", ["--label is not for questions, but for zeroshot"]),
    "classes without images": ("evaluate zeroshot --checkpoint TMP", ["--data is missing"]),
    "classes of no model": ("evaluate zeroshot --checkpoint TMP --data TMP", ["TMP holds no finished model"]),
    "shift of one set": ("evaluate shift --checkpoint TMP --data TMP", ["--data names one data set"]),
    "unknown corruption": ("evaluate shift --checkpoint TMP --data TMP --corruptions rain", ["there is no 'rain'"]),
    "no labels": ("classify --checkpoint TMP --images TMP/picture.png", ["--labels is missing"]),
    "labels twice": (
        "classify --checkpoint TMP --images TMP/picture.png --labels cat,dog,cat", ["names the class 'cat' twice"]
    ),
    "images of no pattern": ("classify --checkpoint TMP --images TMP/*.jpg --labels a,b", ["TMP/*.jpg: no such file"]),
    "images of an empty folder": ("classify --checkpoint TMP --images TMP/other --labels cat,dog", ["has no images"]),
    "templates that are none": (
        "classify --checkpoint TMP --images TMP/picture.png --labels cat,dog --templates TMP/file", ["has no templates"]
    ),
    "picture of no kind": (
        "classify --checkpoint TMP --images TMP/picture.png --labels cat,dog --picture TMP/a.txt", [".png, .pdf, .svg"]
    ),
    "labels and no model": (
        "classify --checkpoint TMP --images TMP/picture.png --labels cat,dog", ["TMP holds no finished model"]
    ),
    "benchmark and data": (
        "evaluate --checkpoint TMP --data TMP/rows.jsonl --benchmark easy_vqa", ["--benchmark and --data exclude"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, files):
    """And nothing is compiled before it: JAX would say so on stderr."""
    text, expected = MISTAKES[name]
    result = command(*text.replace("TMP", str(files)).split(), JAX_LOG_COMPILES="1")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in expected:
        assert part.replace("TMP", str(files)) in lines[0]
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert not (files / "w").exists() or not any((files / "w").rglob("checkpoints"))


@pytest.mark.parametrize(
    "config, length",
    [("pretrain", 38), ("contrast", 64), ("distill", 260), ("align", 98), ("instruct", 98), ("instruct:hovle", 8192)],
)
def test_keys_are_shown_and_nothing_is_trained(config, length, tmp_path):
    stage, _, preset = config.partition(":")
    asked = f"configs/{stage}.py" + f":{preset}" * bool(preset)
    result = command("train", "--config", asked, "--workdir", tmp_path / "w", "--show")
    assert result.returncode == 0 and not result.stderr and not (tmp_path / "w").exists()
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("config.data.sequence_length ")]
    assert line.split()[1] == str(length) and line.endswith("tokens of a row (HD: of the short stream)")


def test_a_stage_is_trained_by_the_command(tmp_path):
    """One of them; of all five, with a trace, answers and a score, the slow test below."""
    short = ["--config.steps=2", "--config.data.batch_size=8", "--config.eval_rows=8", "--config.eval_limit=8"]
    short += ["--config.execution.unroll_layers=False", "--config.model.llm.stack.num_layers=1"]
    call = ["train", "--config", "configs/pretrain.py", "--workdir", tmp_path, *short]
    result = command(*call, timeout=400)
    assert result.returncode == 0 and "== pretrain (1 of 1)" in result.stdout, result.stderr
    for name in ("report.html", "metrics.jsonl", "metrics.png", "config.json", "results.json", "model/llm"):
        assert (tmp_path / "pretrain" / name).exists(), name
    again = command(*call)
    assert again.returncode == 0 and f"pretrain is finished in {tmp_path / 'pretrain'}" in again.stdout


# Each stage, and where its components come from: stages of other lengths than their config files say are named.
STAGES = {
    "pretrain": {}, "contrast": {}, "distill": {"llm": "pretrain", "teacher": "contrast"},
    "align": {"llm": "pretrain", "embedding": "distill"}, "instruct": {"llm": "align", "embedding": "align"},
}  # fmt: skip


@pytest.mark.slow
def test_the_chain_of_stages(tmp_path):
    """Five stages of two steps in one folder, then an answer and a score."""
    workdir = tmp_path / "runs"
    short = ["--config.steps=2", "--config.data.batch_size=8", "--config.eval_limit=64", "--config.eval_rows=12"]
    short += ["--config.execution.unroll_layers=False"]  # a loop compiles sooner
    for stage, sources in STAGES.items():
        init = [f"--config.init.{component}={workdir / source}" for component, source in sources.items()]
        arguments = ["--config", f"configs/{stage}.py", "--workdir", workdir, *short, *init]
        result = command("train", *arguments, "--profile=1:2", timeout=400)
        assert result.returncode == 0, result.stderr
        assert f"== {stage} (1 of 1)" in result.stdout  # the stages before it are found, not trained again
        folder = workdir / stage
        for name in ("report.html", "metrics.jsonl", "first_batch.png", "metrics.png", "config.json", "results.json"):
            assert (folder / name).stat().st_size > 0, f"{stage}: {name}"
        assert list((folder / "profile").rglob("*.xplane.pb")) and "a trace of steps 1 to 1" in result.stdout
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 2 and all(np.isfinite(row.get("loss", 0)) for row in rows)
        assert json.loads((folder / "config.json").read_text())["steps"] == 2
        assert isinstance(json.loads((folder / "results.json").read_text()), dict)
    assert {p.name for p in (workdir / "instruct" / "model").iterdir()} == {
        "config.json",
        "embedding",
        "files.json",
        "llm",
    }
    assert {p.name for p in (workdir / "contrast" / "model").iterdir()} == {"clip", "config.json", "files.json"}

    again = command("train", "--config", "configs/instruct.py", "--workdir", workdir, *short, *init)
    assert again.returncode == 0 and f"instruct is finished in {workdir / 'instruct'}" in again.stdout

    from PIL import Image

    Image.fromarray(micro.draw("red", "circle")).save(tmp_path / "picture.png")
    asked = ["--checkpoint", workdir / "instruct", "--image", tmp_path / "picture.png", "--max_new_tokens", 4]
    questions = ("what color is it?", "is it a circle?")
    alone = command("generate", *asked, "--prompt", questions[1])
    together = command("generate", *asked, "--prompt", questions[0], "--prompt", questions[1])
    assert together.returncode == 0 and len(together.stdout.splitlines()) >= 1, together.stderr
    assert together.stdout.endswith(alone.stdout)

    scored = command(
        "evaluate", "--checkpoint", workdir / "contrast", "--benchmark", "easy_vqa_zero_shot", "--json", "--limit=64"
    )
    scores = json.loads(scored.stdout)
    assert scores["split"] == "test" and scores["images"] == 64 and 0 <= scores["accuracy"] <= 100
    assert len((workdir / "contrast" / "predictions_easy_vqa_zero_shot.jsonl").read_text().splitlines()) == 64
    stored = json.loads((workdir / "contrast" / "results.json").read_text())
    assert stored["accuracy"] == scores["accuracy"]
    questions = json.loads((workdir / "instruct" / "results.json").read_text())
    assert questions["questions"] == 64

    wrong = command("evaluate", "--checkpoint", workdir / "contrast")
    assert wrong.returncode == 2 and "holds no embedding and llm" in wrong.stderr
