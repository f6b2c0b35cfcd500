"""What servers and judges want: the layouts of the files that are submitted."""

import csv
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from hovle_jax.evaluation.public.tsv import Row, Table, plain_name, texts

Answers = Mapping[str, str]  # index -> the model's answer
KEPT_OF_MATHVISTA = ("question_type", "answer_type", "precision", "unit", "answer")


def of_documents(rows: Sequence[Row], answers: Answers) -> list[dict]:
    """DocVQA and InfoVQA (rrc.cvc.uab.es): [{"questionId": 1, "answer": "..."}]."""
    return [{"questionId": _number(_id(row)), "answer": answers[row.index]} for row in rows]


def of_mmvet(rows: Sequence[Row], answers: Answers) -> dict[str, str]:
    """MM-Vet's judge: {"v1_0": "..."}."""
    return {f"v1_{_id(row)}" if _id(row).isdecimal() else _id(row): answers[row.index] for row in rows}


def of_mathvista(rows: Sequence[Row], answers: Answers) -> dict[str, dict]:
    """MathVista's `extract_answer.py`: {pid: the question with "response"}."""
    return {_id(row): _of_mathvista(row, answers[row.index]) for row in rows}


def _of_mathvista(row, answer):
    kept = {name: row.get(name) for name in KEPT_OF_MATHVISTA if row.get(name)}
    query = {"pid": _id(row), "question": row.get("question"), "query": row.get("query") or row.get("question")}
    return query | kept | {"choices": list(texts(row.get("choices"))) or None, "response": answer}


def _id(row):
    names = ("questionid", "question_id", "pid")
    return next((row.get(name) for name in names if row.get(name)), row.index)


def _number(text):
    return int(text) if text.isdecimal() else text


Layout = Callable[[Sequence[Row], Answers], list | dict]


def write_json(path: pathlib.Path, layout: Layout, rows: Sequence[Row], answers: Answers) -> pathlib.Path:
    """Writes a layout that is JSON to PATH.json -> the file."""
    path = path.with_name(f"{path.name}.json")
    path.write_text(json.dumps(layout(rows, answers), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def has_excel() -> bool:
    """Whether .xlsx can be written, for which openpyxl is needed (the extra 'evaluate')."""
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        return False
    return True


def write_rows(path: pathlib.Path, table: Table, rows: Sequence[Row], answers: Answers) -> pathlib.Path:
    """VLMEvalKit's predictions, and MMBench's submission: the columns without the image, and 'prediction'.

    To PATH.xlsx where openpyxl is installed, else to PATH.tsv, which VLMEvalKit reads with PRED_FORMAT=tsv -> the file.
    """
    header = (*(name for name in table.columns if name != "prediction"), "prediction")
    numbers = all(row.index.isdecimal() for row in rows)  # pandas then has numbers, and compares them with numbers
    lines = ([*_cells(row, header[:-1], numbers), answers[row.index]] for row in rows)
    if has_excel():
        return _write_excel(path.with_name(f"{path.name}.xlsx"), header, lines)
    return _write_tsv(path.with_name(f"{path.name}.tsv"), header, lines)


def _cells(row, header, numbers):
    return [int(row.index) if numbers and name == "index" else row.cells[plain_name(name)] for name in header]


def _write_tsv(path, header, lines):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([header, *lines])
    return path


def _write_excel(path, header, lines):
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(value):
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        made.data_type = "s"  # '=5' is an answer and no formula
        return made

    for line in (header, *lines):
        sheet.append([cell(value) for value in line])
    book.save(path)
    return path
