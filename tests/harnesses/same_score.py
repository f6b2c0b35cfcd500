"""Scores by this project's rule sets what VLMEvalKit and lmms-eval asked, beside the scores that they gave.

    python -m tests.harnesses.same_score vlmevalkit outputs/hovle easy_vqa_choice POPE_easy_vqa GQA_easy_vqa
    python -m tests.harnesses.same_score lmms-eval outputs/hovle pope_easy_vqa gqa_easy_vqa

The sets are those of `local_sets.py`. It reads the answers and the scores that the harness wrote (VLMEvalKit with
PRED_FORMAT=tsv, lmms-eval with --log_samples), and exits with 1 where two scores differ by more than 1e-6.
"""

import csv
import json
import pathlib
import sys
from collections.abc import Callable

from hovle_jax.evaluation.rules import Case, scored

LETTERS = "ABCD"


def table(path: pathlib.Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a file with a header."""
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def vlmevalkit(folder: pathlib.Path, name: str) -> tuple[str, list[Case], float, int]:
    """(benchmark, cases, VLMEvalKit's score, how many rows)."""
    rows = table(folder / f"hovle_{name}.tsv", "\t")
    options = [tuple(row[letter] for letter in LETTERS if row.get(letter)) for row in rows]
    cases = [
        Case.of(
            {"prediction": row["prediction"], "answer": row["answer"], "options": some, "category": row["category"]}
        )
        for row, some in zip(rows, options)
    ]
    if name.startswith("POPE"):
        (overall,) = [row for row in table(folder / f"hovle_{name}_score.csv") if row["split"] == "Overall"]
        return "POPE", cases, float(overall["Overall"]), len(rows)
    (row,) = table(folder / f"hovle_{name}_acc.csv")
    if name.startswith("GQA"):
        return "GQA", cases, float(row["Overall"]), len(rows)
    return "SEED", cases, float(row["Overall"]), len(rows)  # any of the plain multiple choices


def lmms_eval(folder: pathlib.Path, name: str) -> tuple[str, list[Case], float, int]:
    """The same of the last run of a task of lmms-eval."""
    samples = max(folder.glob(f"*_samples_{name}.jsonl"))
    results = json.loads((folder / samples.name.replace(f"samples_{name}.jsonl", "results.json")).read_text())
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    answers = [row["filtered_resps"] for row in rows]
    answers = [answer if isinstance(answer, str) else answer[0] for answer in answers]
    cases = [Case(prediction=answer, answers=(row["target"],)) for answer, row in zip(answers, rows)]
    benchmark, metric = ("POPE", "pope_f1_score") if name.startswith("pope") else ("GQA", "exact_match")
    return benchmark, cases, results["results"][name][f"{metric},none"], len(rows)


HARNESSES: dict[str, Callable] = {"vlmevalkit": vlmevalkit, "lmms-eval": lmms_eval}


def main() -> int:
    harness, folder, *names = sys.argv[1:]
    differ = False
    for name in names:
        benchmark, cases, theirs, count = HARNESSES[harness](pathlib.Path(folder), name)
        ours = scored(benchmark, "test", harness, cases)
        print(f"{name:16} {count} answers  {harness} {theirs:.6f}  ours {ours.value:.6f}  ({ours.metric})")
        differ |= abs(ours.value - theirs) > 1e-6
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
