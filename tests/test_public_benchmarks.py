"""VLMEvalKit's TSV files: how they are read, asked, scored, resumed and handed on."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from hovle_jax.config import ModelConfig
from hovle_jax.data.images import decode_image
from hovle_jax.errors import UserError
from hovle_jax.evaluation import asking, benchmarks, rules
from hovle_jax.evaluation.asking import generated
from hovle_jax.evaluation.benchmark import Item
from hovle_jax.evaluation.public import prompts, run
from hovle_jax.evaluation.public.questions import SEED_TYPES, choose, references
from hovle_jax.evaluation.public.run import evaluate_tsv
from hovle_jax.evaluation.public.table import JUDGED, KINDS, PUBLIC
from hovle_jax.evaluation.public.tsv import read_table, texts
from hovle_jax.inference.load import load_run
from tests import broken, micro, tables
from tests.test_commands import ROOT, command

NAMED = (
    "TextVQA DocVQA InfoVQA ChartQA GQA OCRBench POPE MME HallusionBench MMBench MMMU SEED ScienceQA AI2D MM-Vet "
    "MathVista"
).split()
quiet = lambda line: None


def table(path, rows):
    return read_table(tables.write(path / "rows.tsv", rows))


def asked(tmp_path, name, rows=None, **more):
    return choose(PUBLIC[name], table(tmp_path, rows or tables.rows_of(name, PUBLIC[name])), **more)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_all_sixteen_benchmarks_have_a_row():
    assert [row.title for row in PUBLIC.values()] == NAMED
    assert all(benchmarks.BENCHMARKS[name] is row for name, row in PUBLIC.items())
    for row in PUBLIC.values():
        assert row.answer in KINDS and row.split and row.max_new_tokens and (row.server or not row.submission)
        if row.answer == JUDGED:
            assert row.submission and "judge" in row.server and row.metric == "judged"
        else:
            assert row.metric == rules.find(row.title, row.rules).metric
    budgets = {name: row.max_tiles for name, row in PUBLIC.items() if row.max_tiles != 6}
    assert budgets == {"chartqa": 12, "mmmu": 12, "docvqa": 18, "infovqa": 24, "ocrbench": 24}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_benchmark_is_read_asked_and_scored(name, tmp_path):
    found = asked(tmp_path, name)
    items = list(found.items(found.rows))
    asks = [found.benchmark.prompt(item) for item in items]
    assert found.without_image == 0
    assert len(items) == 2 and all(item.images[0].size == (broken.SIDE, broken.SIDE) for item in items)
    assert all(f"what is it, {i}?" in one.turns[0][0] for i, one in enumerate(asks))
    assert all(one.max_tiles == (found.benchmark.max_tiles,) for one in asks)
    if found.benchmark.answer == JUDGED:
        assert found.rule_set == ""
        return
    right = rules.scored(
        found.benchmark.title, found.split, found.rule_set, found.cases(lambda row: references(row)[0])
    )
    wrong = rules.scored(found.benchmark.title, found.split, found.rule_set, found.cases(lambda row: "no"))
    full = {"mme": 200, "ocrbench": 2}.get(name, right.full)  # a pair of one category; two of 1,000 questions
    assert right.value == pytest.approx(full) and wrong.value == 0
    assert right.interval[0] < right.value and wrong.interval[1] > 0


def test_other_rule_sets_score_the_same_file(tmp_path):
    row = tables.rows_of("seed", PUBLIC["seed"], 1)[0]
    found = asked(tmp_path, "seed", [row], rule_set="internvl")
    assert found.cases(lambda row: "A")[0].question_type_id == SEED_TYPES["instance identity"] == 2
    assert asked(tmp_path, "chartqa", rule_set="lmms-eval").rule_set == "lmms-eval"
    with pytest.raises(UserError, match="the row 0 has no question_type_id"):
        asked(tmp_path, "seed", [row | {"category": "else"}], rule_set="internvl")
    with pytest.raises(UserError, match="needs a judge model"):
        asked(tmp_path, "mmvet", rule_set="vlmevalkit")
    with pytest.raises(UserError, match="unknown rule set 'mine'"):
        asked(tmp_path, "gqa", rule_set="mine")


def test_a_row_of_popes_in_three_categories_counts_in_each(tmp_path):
    found = asked(tmp_path, "pope")
    assert [case.category for case in found.cases(lambda row: "yes")] == ["random", "popular"] * 2


def test_the_docs_have_the_table():
    words = {
        prompts.in_a_word: "word", prompts.in_a_word_on_its_line: "word", prompts.yes_or_no: "yes or no",
        prompts.as_asked: "as it is", prompts.by_letter: "letter",
    }  # fmt: skip
    listed = {}
    for line in (ROOT / "docs" / "evaluation.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 6 and cells[0].strip("`") in PUBLIC:
            listed[cells[0].strip("`")] = cells[1:]
    assert list(listed) == list(PUBLIC)
    for name, row in PUBLIC.items():
        asked_in = words[row.words] + ", or directly" * (name == "mmmu")
        judged = row.answer == JUDGED
        scored_by = "judge" if judged else row.rules + "; test: server" * bool(row.server)
        assert listed[name] == [row.split, asked_in, str(row.max_tiles), scored_by, "-" if judged else row.metric]


# ---------------------------------------------------------------------------------------------------------------------
# The words


def words(row, images=1, **more):
    image = decode_image(broken.encoded(0, size=(9, 5)))
    return PUBLIC[row].prompt(Item((image,) * images, (("why?", None),), ("x",), **more))


def test_questions_have_internvls_words():
    two = {"options": ("cat", "dog")}
    letters = "why?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    word = "Answer the question using a single word or phrase."
    for name, text in {
        "ai2d": letters, "textvqa": f"why?\n{word}", "mme": f"why? {word}", "pope": "why?", "mmvet": "why?",
        "hallusionbench": f"why? Please answer yes or no. {word}",
    }.items():  # fmt: skip
        assert words(name, **(two if name == "ai2d" else {})).turns == ((text, None),)
    assert words("mmmu").turns[0][0] == "why?\nAnswer the question directly."
    assert words("mmbench", options=("猫", "狗")).turns[0][0].endswith("\nB. 狗\n请直接回答选项字母。")
    several = words("mmmu", images=2, **two)
    assert several.turns[0][0] == f"Image-1: <image>\nImage-2: <image>\n{letters}" and several.max_tiles == (12, 12)
    assert words("mmmu", images=8).max_tiles == (8,) * 8 and words("mmmu", images=100).max_tiles == (1,) * 100
    assert [image.size for image in several.images] == [(18, 10), (9, 5)]  # MMMU's first one is enlarged
    assert words("ai2d", **two).images[0].size == (9, 5)
    own = prompts.tiled(prompts.as_asked, None)(Item(("a", "b"), (("<image> or <image>?", None),), ("x",)))
    assert own.turns[0][0] == "<image> or <image>?" and own.max_tiles == (None, None)


def test_a_hint_comes_before_a_choice(tmp_path):
    (first, _) = (found := asked(tmp_path, "mmbench")).items(found.rows)
    assert first.question == "Look closely.\nwhat is it, 0?" and first.options == ("cat", "dog")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_images_lie_in_cells_in_other_rows_and_in_files(tmp_path):
    large = tables.image(1, size=(400, 300))  # over the 128 KiB that Python's reader has as its limit
    rows = [
        {"index": "a", "image": "c", "question": "of a later row"},
        {"index": "b", "image": large, "question": 'two\nlines, a tab\t and "quotes"'},
        {"index": "c", "image": f"['{tables.image(2)}', '{tables.image(3, size=(8, 4))}']", "question": "ä"},
        {"index": "d", "image": "", "question": "nothing to see"},
    ]
    found = table(tmp_path, rows)
    assert len(large) > 131_072 and found.columns == ("index", "question") and not found.rows[3].has_image
    sizes = [[image.size for image in found.images(row)] for row in found.rows[:3]]
    assert sizes == [[(32, 32), (8, 4)], [(400, 300)], [(32, 32), (8, 4)]]
    assert [row.cells["question"] for row in found.rows] == [row["question"] for row in rows]

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(broken.encoded(4, size=(9, 5)))
    beside = table(tmp_path, [{"index": 0, "image_path": "['images/1.png']", "question": "?"}])
    assert [image.size for image in beside.images(beside.rows[0])] == [(9, 5)]


def test_a_file_with_other_marks_is_read(tmp_path):
    path = tmp_path / "rows.tsv"
    text = f"index\tImage\tQuestion\n7\tdata:image/png;base64,{tables.image()}\twhat?\n\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = read_table(path)
    assert found.rows[0].index == "7" and found.images(found.rows[0])[0].size == (32, 32)


def test_cells_hold_texts_or_lists():
    assert texts("['1,000', \"it's\", 3]") == ("1,000", "it's", "3") and texts("red") == ("red",)
    assert texts("[sic]") == ("[sic]",) and texts("") == ()


GOOD = {"index": 1, "image": tables.image(), "question": "?", "A": "cat", "B": "dog", "answer": "A"}


@pytest.mark.parametrize("rows, match", [
    ([{"index": 1, "image": "x"}], "has no column 'question'"),
    ([{"index": 1, "question": "x"}], "has no column 'image' and none 'image_path'"),
    ([GOOD, GOOD], r"row 2 \(index '1'\), column 'index': row 1 has the same"),
    ([GOOD | {"index": ""}], r"row 1 \(index ''\), column 'index': it is empty"),
    ([GOOD | {"image": "2"}], "row 1 .*, column 'image': '2' is too short for an image, and no row has it"),
    ([GOOD | {"image": "2"}, GOOD | {"index": 2, "image": "1"}], "column 'image': the row '2' that it refers to has"),
    ([GOOD | {"image": "?" * 100}], "row 1 .*, column 'image': no base64"),
    ([GOOD | {"image": "QUJD" * 100}], "row 1 .*, column 'image': not_an_image"),
    ([GOOD | {"image": ""}], "no row with an image"),
    ([GOOD | {"question": " "}], "row 1 .*, column 'question': it is empty"),
    ([GOOD | {"answer": "C"}], "row 1 .*, column 'answer': 'C' is the letter of none of its options, A to B"),
    ([GOOD, GOOD | {"index": 2, "answer": ""}], "row 2 .*, column 'answer': it is empty; other rows have"),
    ([GOOD | {"B": ""}], "row 1 .*, column 'B': it is empty, and the question needs two options"),
    ([GOOD | {"B": "", "C": "bird"}], "row 1 .*, column 'B': it is empty, and there is an option C"),
    ([GOOD | {"answer": ""}], "has no answers, and no server takes AI2D"),
    ([{name: GOOD[name] for name in ("index", "image", "question", "A", "answer")}], "no column 'B', which AI2D needs"),
])  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(rows, match, tmp_path):
    with pytest.raises(UserError, match=match):
        found = asked(tmp_path, "ai2d", rows)
        list(found.items(found.rows))


@pytest.mark.parametrize("content, match", [
    (b"index\tquestion\timage\n1\tx\n", "row 1, column 'image': 2 cells for 3 columns"),
    (b"index\tquestion\timage\n1\tx\ty\tz\n", "row 1, column 'after the last': 4 cells for 3 columns"),
    (b"index\tquestion\timage\n1\t\xff\ty\n", "row 1: no UTF-8"),
    (b"index\tquestion\timage\n1\ta\rb\ty\n", "row 1: no table of tab-separated values"),
    (b"index\tquestion\timage\timage\n", "has the column 'image' twice"),
    (b"", "has no column 'index'"),
])  # fmt: skip
def test_what_is_no_table_is_said(content, match, tmp_path):
    (tmp_path / "rows.tsv").write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_table(tmp_path / "rows.tsv")
    with pytest.raises(UserError, match="no TSV file at .*absent.tsv"):
        read_table(tmp_path / "absent.tsv")


def test_absent_files_and_answers_that_are_none(tmp_path):
    found = table(tmp_path, [{"index": 0, "image_path": "absent.png", "question": "?"}])
    with pytest.raises(UserError, match=r"row 1 .*, column 'image_path': there is no image .*absent.png"):
        found.images(found.rows[0])
    with pytest.raises(UserError, match="column 'answer': 'maybe' is neither yes nor no"):
        asked(tmp_path, "pope", tables.rows_of("pope", PUBLIC["pope"], answer="maybe"))
    with pytest.raises(UserError, match=r"count: the image '1.jpg' has 3 question\(s\), not 2"):
        asked(tmp_path, "mme", tables.rows_of("mme", PUBLIC["mme"], 3))
    with pytest.raises(UserError, match="MMBench's index 'x' is no number"):
        asked(tmp_path, "mmbench", tables.rows_of("mmbench", PUBLIC["mmbench"], 1, index="x"))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a file


def test_splits(tmp_path):
    both = [GOOD | {"index": i, "split": split} for i, split in enumerate(["dev", "validation", "validation"])]
    found = asked(tmp_path, "mmmu", both)
    assert (found.split, [row.index for row in found.rows]) == ("validation", ["1", "2"])
    assert asked(tmp_path, "mmmu", both, split="dev").split == "dev"
    assert asked(tmp_path, "chartqa").split == "test_human" and asked(tmp_path, "gqa").split == "testdev_balanced"
    with pytest.raises(UserError, match="no rows of split 'test'; its splits are: dev, validation"):
        asked(tmp_path, "mmmu", both, split="test")


def test_a_limit_keeps_whole_questions(tmp_path):
    rotations = [GOOD | {"index": i + 1_000_000 * turn, "split": "dev"} for turn in range(2) for i in (1, 2, 3)]
    assert [row.index for row in asked(tmp_path, "mmbench", rotations, limit=2).rows] == [
        "1",
        "2",
        "1000001",
        "1000002",
    ]
    pairs = [row | {"index": i, "image_path": f"{i // 2}.jpg"}
             for i, row in enumerate(tables.rows_of("mme", PUBLIC["mme"], 6))]  # fmt: skip
    assert len(asked(tmp_path, "mme", pairs, limit=1).rows) == 2
    assert len(asked(tmp_path, "gqa", limit=1).rows) == len(asked(tmp_path, "mmvet", limit=1).rows) == 1


def test_rows_without_an_image_are_left_out_and_counted(says, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hovle_jax.evaluation.public.submissions.has_excel", lambda: False)
    items = says(lambda item: "red")
    rows = tables.rows_of("gqa", PUBLIC["gqa"], 3)
    path = tables.write(tmp_path / "GQA.tsv", [rows[0], rows[1] | {"image": ""}, rows[2]])
    found = evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=quiet)
    assert [item.question for item in items] == ["what is it, 0?", "what is it, 2?"]
    assert found.details()["rows without an image"] == 1 and found.scores["accuracy"] == 100
    assert [row["index"] for row in tables.read(found.files["predictions"])] == ["0", "2"]


def test_answers_that_are_not_known_are_submitted(tmp_path):
    rows = tables.rows_of("docvqa", PUBLIC["docvqa"], answer="", questionId=17)
    found = asked(tmp_path, "docvqa", rows)
    assert (found.rule_set, found.split) == ("", "test") and "rrc.cvc.uab.es" in found.benchmark.server
    with pytest.raises(UserError, match="has no answers, so no rules can score it: leave --rules out"):
        asked(tmp_path, "docvqa", rows, rule_set="internvl")
    assert asked(tmp_path, "mmbench", rule_set="internvl").rule_set == ""  # InternVL leaves all to the server


# ---------------------------------------------------------------------------------------------------------------------
# A model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return micro.finished_run(tmp_path_factory.mktemp("runs") / "instruct")


@pytest.fixture
def says(monkeypatch, run_folder):
    """Puts answers in the model's mouth: says(function of an item); it returns the list of items that were asked."""

    def put(answer):
        items = []
        monkeypatch.setattr(asking, "load_run", lambda *_: None)
        ask = lambda *_: lambda given: (items.append(item) or answer(item) for item in given)
        for name, row in PUBLIC.items():
            monkeypatch.setitem(benchmarks.BENCHMARKS, name, dataclasses.replace(row, ask=ask, batch_size=1))
        return items

    return put


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.usefixtures("quick_compilation")
def test_a_model_answers_a_tsv(run_folder, tmp_path):
    rows = tables.rows_of("textvqa", PUBLIC["textvqa"], 3)
    path = tables.write(tmp_path / "TextVQA_VAL.tsv", rows)
    found = evaluate_tsv(run_folder, "textvqa", path, out=tmp_path / "out", max_new_tokens=4, say=quiet)
    assert found.about == {"benchmark": "TextVQA", "split": "val", "rules": "vlmevalkit"}
    about, *said = lines(tmp_path / "out" / "predictions_TextVQA_VAL.jsonl")
    assert [one["index"] for one in said] == ["0", "1", "2"] and all(one["prediction"] for one in said)
    assert about["about"]["max_new_tokens"] == 4
    assert about["about"]["max_tiles"] == 1  # as in training, which was on one tile


def test_a_model_of_tiles_has_the_benchmarks_budget(says, run_folder, tmp_path, monkeypatch):
    says(lambda item: "red")
    monkeypatch.setattr(run, "load_model_config", lambda folder: ModelConfig(max_tiles=12))
    path = tables.write(tmp_path / "DocVQA_VAL.tsv", tables.rows_of("docvqa", PUBLIC["docvqa"]))
    assert evaluate_tsv(run_folder, "docvqa", path, out=tmp_path, say=quiet).settings["max_tiles"] == 18
    more = evaluate_tsv(run_folder, "docvqa", path, out=tmp_path / "more", max_tiles=40, say=quiet)
    assert more.settings["max_tiles"] == 40


def test_a_prompts_own_limit_of_tiles_is_kept(run_folder):
    """The words of a benchmark say how many tiles an image has, on a model of more."""
    loaded = load_run(run_folder).with_max_tiles(9)
    image, seen = broken.encoded(0, size=(96, 32)), []
    item = Item.of(decode_image(image), "?", "x")
    sample = loaded.answerer.processor.sample
    processor = SimpleNamespace(sample=lambda *given: seen.append(sample(*given)) or seen[-1])
    answerer = SimpleNamespace(processor=processor, hovle=loaded.answerer.hovle)
    for limit in (None, 3, 1):
        with pytest.raises(AttributeError):  # nothing answers: the prompts are made before
            ask = generated(SimpleNamespace(answerer=answerer), prompts.tiled(prompts.as_asked, limit), 4, 1)
            list(ask([item]))
    assert len(seen[0].tiles) > len(seen[2].tiles) == 1 and len(seen[1].tiles) == 4  # with a thumbnail


def test_scores_are_kept_with_what_they_are_of(says, run_folder, tmp_path):
    items = says(lambda item: "Yes." if item.question.endswith("0?") else "no")
    path = tables.write(tmp_path / "POPE.tsv", tables.rows_of("pope", PUBLIC["pope"]))
    found = evaluate_tsv(run_folder, "pope", path, out=tmp_path, say=quiet)
    assert found.scores == {"mean of the categories' F1": 66.667, "of": 100, "questions": 2}
    evaluate_tsv(run_folder, "pope", path, "vlmevalkit", out=tmp_path, say=quiet)
    evaluate_tsv(run_folder, "pope", path, "lmms-eval", out=tmp_path, say=quiet)
    evaluate_tsv(run_folder, "pope", path, "lmms-eval", out=tmp_path, say=quiet)
    assert len(items) == 2  # other rules score the same answers
    evaluate_tsv(run_folder, "pope", path, limit=1, out=tmp_path, say=quiet)  # replaces no score of all questions
    scores = json.loads((tmp_path / "results_POPE.json").read_text())["scores"]
    assert scores.pop()["questions"] == 1
    assert [(one["benchmark"], one["split"], one["rules"], round(one["value"], 3), one["of"]) for one in scores] == [
        ("POPE", "test", "internvl", 66.667, 100), ("POPE", "test", "vlmevalkit", 66.667, 100),
        ("POPE", "test", "lmms-eval", 0, 1),
    ]  # fmt: skip
    for one in scores:
        low, high = one["95% interval"]
        assert low <= one["value"] <= high and low < high and one["report"]
    details = found.details()
    assert details["report"]["f1"] == {"random": pytest.approx(2 / 3), "popular": pytest.approx(2 / 3)}
    assert json.loads(json.dumps(details)) == details


def test_the_command_prints_what_a_score_is_of(says, run_folder, tmp_path):
    says(lambda item: "yes")
    path = tables.write(tmp_path / "POPE.tsv", tables.rows_of("pope", PUBLIC["pope"]))
    evaluate_tsv(run_folder, "pope", path, out=tmp_path, say=quiet)  # so that the command need not ask
    line = (
        f"--checkpoint {run_folder} --benchmark pope --tsv {path} --rules vlmevalkit --limit 1 --out {tmp_path} --json"
    )
    done = command("evaluate", *line.split())
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    del printed["seconds"], printed["95% interval"], printed["report"]
    assert printed == {
        "benchmark": "POPE", "split": "test", "rules": "vlmevalkit", "checkpoint": str(run_folder), "of": 100,
        "F1 of all": 100.0, "questions": 1, "results": str(tmp_path / "results_POPE.json"),
        "predictions": str(next(tmp_path.glob("instruct_POPE.*"))),
    }  # fmt: skip


def test_vlmevalkit_can_score_the_predictions_again(says, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hovle_jax.evaluation.public.submissions.has_excel", lambda: False)
    says(lambda item: '=1\t"A"\nB')
    rows = tables.rows_of("mmbench", PUBLIC["mmbench"])
    path = tables.write(tmp_path / "MMBench_DEV_EN.tsv", rows)
    found = evaluate_tsv(run_folder, "mmbench", path, out=tmp_path, say=quiet)
    assert found.files["predictions"] == tmp_path / "instruct_MMBench_DEV_EN.tsv"
    written = tables.read(found.files["predictions"])
    kept = [{name: str(value) for name, value in row.items() if name != "image"} for row in rows]
    assert written == [row | {"prediction": '=1\t"A"\nB'} for row in kept]


def test_predictions_are_excels_where_that_can_be_written(says, run_folder, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    says(lambda item: "=1\x00")
    path = tables.write(tmp_path / "AI2D_TEST.tsv", [GOOD | {"index": 10}])
    found = evaluate_tsv(run_folder, "ai2d", path, out=tmp_path, say=quiet)
    assert found.files["predictions"] == tmp_path / "instruct_AI2D_TEST.xlsx"
    header, line = openpyxl.load_workbook(found.files["predictions"]).active.values
    assert dict(zip(header, line, strict=True)) == {
        "index": 10, "question": "?", "A": "cat", "B": "dog", "answer": "A", "prediction": "=1",
    }  # fmt: skip


@pytest.mark.parametrize("name, changes, expected", [
    ("docvqa", {"answer": "", "questionId": "17"}, [{"questionId": 17, "answer": "four"}]),
    ("infovqa", {"answer": ""}, [{"questionId": 0, "answer": "four"}]),
    ("mmvet", {}, {"v1_0": "four"}),
    ("mathvista", {}, {"0": {
        "pid": "0", "question": "what is it, 0?", "query": "what is it, 0?", "question_type": "multi_choice",
        "answer_type": "text", "answer": "red", "choices": ["1,000", "2"], "response": "four",
    }}),
])  # fmt: skip
def test_what_others_score_is_written_as_they_want_it(name, changes, expected, says, run_folder, tmp_path):
    says(lambda item: "four")
    path = tables.write(tmp_path / "rows.tsv", tables.rows_of(name, PUBLIC[name], 1, **changes))
    found = evaluate_tsv(run_folder, name, path, out=tmp_path, say=quiet)
    assert json.loads(found.files["submission"].read_text()) == expected
    assert found.score is None and found.details()["scored by"] == PUBLIC[name].server and "results" not in found.files
    assert found.scores == {"questions": 1} and found.files["predictions"].is_file()


def test_mmbenchs_test_split_is_submitted_as_rows(says, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hovle_jax.evaluation.public.submissions.has_excel", lambda: False)
    monkeypatch.setattr(run, "has_excel", lambda: False)
    says(lambda item: "A")
    rows = [row | {"answer": "", "split": "test"} for row in tables.rows_of("mmbench", PUBLIC["mmbench"])]
    path, said = tables.write(tmp_path / "MMBench_TEST_EN.tsv", rows), []
    found = evaluate_tsv(run_folder, "mmbench", path, out=tmp_path, say=said.append)
    assert found.about == {"benchmark": "MMBench", "split": "test"} and "takes .xlsx: pip install openpyxl" in said[-1]
    assert [row["prediction"] for row in tables.read(tmp_path / "submission_MMBench_TEST_EN.tsv")] == ["A", "A"]


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


def test_an_interrupted_evaluation_goes_on(says, run_folder, tmp_path):
    path = tables.write(tmp_path / "GQA.tsv", tables.rows_of("gqa", PUBLIC["gqa"], 9))

    def until_five(item):
        if item.question == "what is it, 5?":
            raise KeyboardInterrupt
        return "red"

    says(until_five)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=quiet)
    answers = tmp_path / "predictions_GQA.jsonl"
    assert len(lines(answers)) == 6  # what they are of, and the first five
    with answers.open("a") as file:
        file.write('{"index": "5", "predi')
    items, told = says(lambda item: "red"), []
    found = evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=told.append)
    assert [item.question for item in items] == [f"what is it, {i}?" for i in range(5, 9)]
    assert told[0] == f"{answers} has 5 of 9 answers: going on from there"
    assert found.scores["questions"] == 9 and len(lines(answers)) == 10


@pytest.mark.parametrize("changes, match", [
    (dict(max_tiles=2), r"has answers of another evaluation \(max_tiles=1, not 2\): delete it"),
    (dict(max_new_tokens=3), "max_new_tokens=64, not 3"),
    (dict(rows=3), "cells="),
])  # fmt: skip
def test_answers_of_something_else_are_not_taken(changes, match, says, run_folder, tmp_path):
    says(lambda item: "red")
    path = tables.write(tmp_path / "GQA.tsv", tables.rows_of("gqa", PUBLIC["gqa"]))
    evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=quiet)
    tables.write(path, tables.rows_of("gqa", PUBLIC["gqa"], changes.pop("rows", 2)))
    with pytest.raises(UserError, match=match):
        evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=quiet, **changes)


def test_a_model_that_was_trained_further_is_asked_again(says, run_folder, tmp_path):
    says(lambda item: "red")
    shutil.copytree(run_folder, tmp_path / "instruct")
    path = tables.write(tmp_path / "GQA.tsv", tables.rows_of("gqa", PUBLIC["gqa"]))
    evaluate_tsv(tmp_path / "instruct", "gqa", path, say=quiet)
    os.utime(tmp_path / "instruct" / "model" / "config.json", (2e9, 2e9))
    with pytest.raises(UserError, match="model written='.*', not '2033-05-18T03:33:20"):
        evaluate_tsv(tmp_path / "instruct", "gqa", path, say=quiet)


def test_a_folder_that_cannot_be_written_or_has_other_files(says, run_folder, tmp_path):
    says(lambda item: "red")
    path = tables.write(tmp_path / "GQA.tsv", tables.rows_of("gqa", PUBLIC["gqa"]))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*predictions_GQA.jsonl.*--out"):
        evaluate_tsv(run_folder, "gqa", path, out=tmp_path / "file", say=quiet)
    (tmp_path / "predictions_GQA.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UserError, match="is no file of answers to a TSV"):
        evaluate_tsv(run_folder, "gqa", path, out=tmp_path, say=quiet)


def test_names_that_read_no_tsv(run_folder, tmp_path):
    with pytest.raises(UserError, match="easy_vqa reads no TSV: leave --tsv out, or use one of textvqa"):
        evaluate_tsv(run_folder, "easy_vqa", tmp_path / "x.tsv")
    with pytest.raises(UserError, match="pope has its questions in a TSV of VLMEvalKit: name it with --tsv"):
        benchmarks.evaluate(run_folder, "pope")
