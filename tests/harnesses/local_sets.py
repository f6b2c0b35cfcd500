"""Writes local sets in the formats of VLMEvalKit and lmms-eval, from easy-VQA's test split.

    python -m tests.harnesses.local_sets FOLDER [--rows 200] [--port 8000]

FOLDER then has
  LMUData/easy_vqa_choice.tsv      a multiple choice of four, VLMEvalKit's MMBench layout
  LMUData/POPE_easy_vqa.tsv        yes or no, VLMEvalKit's POPE layout
  LMUData/GQA_easy_vqa.tsv         short answers, VLMEvalKit's GQA layout
  vlmevalkit.json                  a config with the last two and the server at 127.0.0.1:PORT
  tasks/pope_easy_vqa.yaml, ...    lmms-eval's tasks with its own scorers of POPE and GQA, and their rows as Parquet
Docs: docs/evaluation.md, "The public harnesses".
"""

import argparse
import base64
import csv
import io
import itertools
import json
import pathlib
import random
from collections.abc import Iterator

from PIL import Image

from hovle_jax.corpora import easy_vqa
from hovle_jax.evaluation.easy_vqa import answer_kind

LETTERS = "ABCD"
FEATURES = {
    "question_id": {"dtype": "string", "_type": "Value"},
    "question": {"dtype": "string", "_type": "Value"},
    "answer": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
}
# lmms-eval reads functions from a file beside the task; these are its own.
UTILS = """\
from lmms_eval.tasks.gqa.utils import gqa_doc_to_text, gqa_doc_to_visual
from lmms_eval.tasks.pope.utils import *
"""
TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{of}_doc_to_visual
doc_to_text: !function utils.{of}_doc_to_text
doc_to_target: answer
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
metric_list:
"""
POPE_METRICS = """\
  - metric: pope_f1_score
    aggregation: !function utils.pope_aggregate_f1_score
    higher_is_better: true
  - metric: pope_accuracy
    aggregation: !function utils.pope_aggregate_accuracy
    higher_is_better: true
process_results: !function utils.pope_process_results
"""
GQA_METRICS = """\
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""


def questions(*kinds: str) -> Iterator[tuple[int, bytes, str, str, str]]:
    """(number, image as PNG, question, answer, its kind), one of an image, over all images again and again."""
    examples = easy_vqa.load("test")
    rounds = itertools.zip_longest(*([(e, q, a) for q, a in e.questions if answer_kind(a) in kinds] for e in examples))
    rows = (row for one_of_each in rounds for row in one_of_each if row)
    for number, (example, question, answer) in enumerate(rows):
        yield number, png(example.image), question, answer, answer_kind(answer)


def png(image) -> bytes:
    """An array as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_tsv(path: pathlib.Path, rows: list[dict]) -> None:
    """VLMEvalKit's format: a header, images as base64."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def choices(count: int) -> list[dict]:
    """Colours, each beside three others; the same rows at every call."""
    rng, rows = random.Random(0), []
    for number, image, question, answer, kind in itertools.islice(questions("colour"), count):
        options = [answer, *rng.sample([color for color in easy_vqa.COLORS if color != answer], 3)]
        rng.shuffle(options)
        row = {"index": number, "image": base64.b64encode(image).decode(), "question": question}
        row |= dict(zip(LETTERS, options)) | {"answer": LETTERS[options.index(answer)], "category": kind}
        rows.append(row)
    return rows


def plain(count: int, *kinds: str, capital: bool = False) -> list[dict]:
    """Questions with short answers."""
    return [
        {
            "index": number,
            "image": base64.b64encode(image).decode(),
            "question": question,
            "answer": answer.capitalize() if capital else answer,
            "category": kind,
        }
        for number, image, question, answer, kind in itertools.islice(questions(*kinds), count)
    ]


def write_vlmevalkit(folder: pathlib.Path, count: int, port: int) -> None:
    """The TSVs and the config."""
    data = folder / "LMUData"
    data.mkdir(parents=True, exist_ok=True)
    write_tsv(data / "easy_vqa_choice.tsv", choices(count))
    write_tsv(data / "POPE_easy_vqa.tsv", plain(count, "yes/no", capital=True))
    write_tsv(data / "GQA_easy_vqa.tsv", plain(count, "yes/no", "colour", "shape"))
    model = {"class": "LMDeployAPI", "model": "hovle", "api_base": f"http://127.0.0.1:{port}/v1/chat/completions"}
    sets = {"POPE_easy_vqa": "ImageYORNDataset", "GQA_easy_vqa": "ImageVQADataset"}
    data = {name: {"class": of, "dataset": name} for name, of in sets.items()}
    (folder / "vlmevalkit.json").write_text(json.dumps({"model": {"hovle": model}, "data": data}, indent=2))


def write_lmms_eval(folder: pathlib.Path, count: int) -> None:
    """The tasks and their rows; images are a feature of Hugging Face's datasets."""
    import pyarrow
    import pyarrow.parquet

    tasks = (folder / "tasks").absolute()
    tasks.mkdir(parents=True, exist_ok=True)
    (tasks / "utils.py").write_text(UTILS)
    for name, of, kinds, metrics in (
        ("pope_easy_vqa", "pope", ["yes/no"], POPE_METRICS),
        ("gqa_easy_vqa", "gqa", ["yes/no", "colour", "shape"], GQA_METRICS),
    ):
        rows = [
            dict(question_id=str(number), question=question, answer=answer, image={"bytes": image, "path": None})
            for number, image, question, answer, _ in itertools.islice(questions(*kinds), count)
        ]
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        texts = [(key, pyarrow.string()) for key in ("question_id", "question", "answer")]
        about = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
        schema = pyarrow.schema([*texts, ("image", image)], about)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tasks / f"{name}.parquet")
        task = TASK.format(name=name, data=tasks / f"{name}.parquet", of=of) + metrics
        (tasks / f"{name}.yaml").write_text(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=200, help="of each set")
    parser.add_argument("--port", type=int, default=8000, help="of the server")
    given = parser.parse_args()
    write_vlmevalkit(given.folder, given.rows, given.port)
    write_lmms_eval(given.folder, given.rows)


if __name__ == "__main__":
    main()
