"""Local sets in the harnesses' formats, the scores beside theirs, and the requests that they send."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.corpora import easy_vqa
from hovle_jax.serving.images import Images
from hovle_jax.serving.limits import Limits
from hovle_jax.serving.protocol import parsed
from tests.harnesses import local_sets, same_score
from tests.launch_tools import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sets")
    local_sets.write_vlmevalkit(made, 40, 8123)
    local_sets.write_lmms_eval(made, 40)
    return made


def test_a_tsv_has_the_images_and_answers_of_the_corpus(folder):
    asked = {(q, a) for example in easy_vqa.load("test") for q, a in example.questions}
    images = [example.image for example in easy_vqa.load("test")]
    for name in ("easy_vqa_choice", "POPE_easy_vqa", "GQA_easy_vqa"):
        rows = same_score.table(folder / "LMUData" / f"{name}.tsv", "\t")
        assert [row["index"] for row in rows] == [str(i) for i in range(40)]
        for row in rows:
            answer = row[row["answer"]] if "A" in row else row["answer"].lower()
            assert (row["question"], answer) in asked
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["image"]))))
            assert any(np.array_equal(seen, image) for image in images)
        if "A" in rows[0]:
            assert all(len({row[letter] for letter in "ABCD"}) == 4 for row in rows)
            assert {row["answer"] for row in rows} == set("ABCD")
    config = json.loads((folder / "vlmevalkit.json").read_text())
    assert config["model"]["hovle"]["api_base"] == "http://127.0.0.1:8123/v1/chat/completions"
    assert all((folder / "LMUData" / f"{name}.tsv").is_file() for name in config["data"])


def test_a_task_has_its_rows_beside_it(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("pope_easy_vqa", "gqa_easy_vqa"):
        task = (folder / "tasks" / f"{name}.yaml").read_text()
        assert str(folder / "tasks" / f"{name}.parquet") in task and f"task: {name}" in task
        rows = parquet.read_table(folder / "tasks" / f"{name}.parquet")
        about = json.loads(rows.schema.metadata[b"huggingface"])["info"]["features"]
        assert list(about) == rows.column_names and about["image"] == {"_type": "Image"} and rows.num_rows == 40
        assert Image.open(io.BytesIO(rows["image"][0].as_py()["bytes"])).size == (64, 64)


def answered(folder, tmp_path, name, wrong):
    """VLMEvalKit's predictions of a set, with the first so many wrong."""
    rows = same_score.table(folder / "LMUData" / f"{name}.tsv", "\t")
    rows = [row | {"prediction": "?" if i < wrong else row["answer"]} for i, row in enumerate(rows)]
    local_sets.write_tsv(tmp_path / f"hovle_{name}.tsv", rows)
    return rows


def test_equal_scores_pass_and_others_do_not(folder, tmp_path, monkeypatch, capsys):
    answered(folder, tmp_path, "GQA_easy_vqa", 10)
    rows = answered(folder, tmp_path, "POPE_easy_vqa", 0)
    answered(folder, tmp_path, "easy_vqa_choice", 4)
    (tmp_path / "hovle_GQA_easy_vqa_acc.csv").write_text('"Overall","colour"\n"75.0","70.0"\n')
    (tmp_path / "hovle_POPE_easy_vqa_score.csv").write_text('"split","Overall"\n"Overall","100.0"\n"yes/no","1"\n')
    (tmp_path / "hovle_easy_vqa_choice_acc.csv").write_text('"split","Overall"\n"none","0.9"\n')
    lines = [json.dumps({"filtered_resps": row["prediction"], "target": row["answer"].lower()}) for row in rows]
    (tmp_path / "1_samples_pope_easy_vqa.jsonl").write_text("\n".join(lines))
    scores = {"results": {"pope_easy_vqa": {"pope_f1_score,none": 1.0}}}
    (tmp_path / "1_results.json").write_text(json.dumps(scores))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["same_score", *arguments])
        return same_score.main()

    names = "GQA_easy_vqa", "POPE_easy_vqa", "easy_vqa_choice"
    assert run("vlmevalkit", str(tmp_path), *names) == 0
    assert run("lmms-eval", str(tmp_path), "pope_easy_vqa") == 0
    assert "GQA_easy_vqa     40 answers  vlmevalkit 75.000000  ours 75.000000" in capsys.readouterr().out
    (tmp_path / "hovle_GQA_easy_vqa_acc.csv").write_text('"Overall"\n"77.5"\n')
    assert run("vlmevalkit", str(tmp_path), *names) == 1


REQUESTS = json.loads((ROOT / "tests" / "fixtures" / "harness_requests.json").read_text())


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_harness_sent_is_read_in_full(name):
    """Bodies as ms-vlmeval 0.0.20 and lmms-eval 0.7.3 sent them, each about one image of 64 pixels.

    VLMEvalKit sends it text first, and enlarged to 100 pixels.
    """
    body = REQUESTS[name]
    asked = parsed(body, Limits(), Images(Limits()).fetched)
    ((question, answer),) = asked.prompt.turns
    parts = body["messages"][0]["content"]
    (text,) = [part["text"] for part in parts if part["type"] == "text"]
    assert question == f"<image>\n{text}" and answer is None  # the image first, wherever it was
    side, tiles = (100, 6) if name.startswith("VLMEvalKit") else (64, None)
    assert [image.size for image in asked.prompt.images] == [(side, side)] and asked.prompt.max_tiles == (tiles,)
    (request,) = asked.requests
    assert request.sampling.temperature == 0 and request.max_new_tokens == min(body["max_tokens"], Limits().new_tokens)
