"""Small TSV files in the layout of VLMEvalKit, and rows that all public benchmarks can score."""

import base64
import csv

from tests import broken

ANSWERS = {"letter": "A", "letter or text": "B", "yes or no": "Yes", "text": "['red', 'dark red']", "judged": "red"}
# What a benchmark reads besides.
MORE = {
    "textvqa": {"answer": str(["red"] * 10)},
    "gqa": {"answer": "red"},
    "pope": {"category": "random,popular"},
    "mme": {"category": "count", "image_path": "1.jpg"},
    "hallusionbench": {"category": "VD", "l2-category": "chart"},
    "ocrbench": {"category": "Doc-oriented VQA"},
    "mmbench": {"split": "dev", "category": "colour", "l2-category": "perception", "hint": "Look closely."},
    "chartqa": {"split": "test_human"},
    "mmmu": {"split": "validation"},
    "seed": {"category": "Instance Identity"},
    "mathvista": {"choices": "['1,000', '2']", "question_type": "multi_choice", "answer_type": "text"},
}


def image(seed=0, **more):
    """An image as base64."""
    return base64.b64encode(broken.encoded(seed, **more)).decode()


def rows_of(name, benchmark, count=2, **changes):
    """Rows of a benchmark, each with its image."""
    rows = []
    for i in range(count):
        row = {"index": i, "image": image(i), "question": f"what is it, {i}?"}
        if benchmark.answer.startswith("letter"):
            row |= {"A": "cat", "B": "dog"}
        row |= {"answer": ANSWERS[benchmark.answer]} | MORE.get(name, {}) | changes
        if name == "hallusionbench":
            row["index"] = f"h_VD_chart_{i}_0_0"
        rows.append(row)
    return rows


def write(path, rows):
    """A TSV as pandas writes it: quotes where they are needed, nothing for what is missing."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([columns, *([row.get(column, "") for column in columns] for row in rows)])
    return path


def read(path):
    """The rows of a TSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
