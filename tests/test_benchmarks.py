"""Benchmarks of one row, own data in every kind of file, and how questions are batched."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.data.bad_samples import BadEvent, BadSample
from hovle_jax.data.batch import Sample
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.records import parse
from hovle_jax.errors import UserError
from hovle_jax.evaluation import asking, benchmarks, own_data, summary
from hovle_jax.evaluation.asking import Shapes
from hovle_jax.evaluation.benchmark import Benchmark, Item
from hovle_jax.evaluation.own_data import evaluate_data, items_of, own_benchmark, predictions_path
from hovle_jax.evaluation.remembering import remembered
from hovle_jax.evaluation.results import sample, write_predictions
from hovle_jax.evaluation.scorers import choice, exact, vqa
from hovle_jax.inference.growing import GrowingEngine
from hovle_jax.training.stages import STAGES
from tests import broken, micro
from tests.source_files import COUNT, ROWS, quiet, write_jsonl

PICTURE = micro.examples()[0].image


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return micro.finished_run(tmp_path_factory.mktemp("runs") / "instruct")


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def own_items(answers=("",) * 4):
    """Two images, two questions each."""
    for i, reference in enumerate(answers):
        image = micro.examples()[5 * (i // 2)].image
        yield Item.of(image, ("what is it?", "and now?")[i % 2], reference, group=("first", "second")[i % 2])


# ---------------------------------------------------------------------------------------------------------------------
# A benchmark in this file alone


@pytest.mark.usefixtures("quick_compilation")
def test_a_benchmark_is_one_row(run_folder, tmp_path, monkeypatch):
    """A source, a prompt and a scorer: nothing else has to know of it."""
    row = Benchmark(items=own_items, max_new_tokens=4, batch_size=4, parts={"letter": lambda text: text[:1]})
    monkeypatch.setitem(benchmarks.BENCHMARKS, "own", row)
    said = [one.answer for one in benchmarks.evaluate(run_folder, "own").answered]
    assert len(said) == 4 and all(said)

    references = (said[0], said[1], said[2], f"not {said[3]}")
    row = dataclasses.replace(row, items=lambda: own_items(references))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "own", row)
    scored = benchmarks.evaluate(run_folder, "own")
    letter = 75.0 + 25 * (said[3][:1] == "n")
    assert scored.scores == {
        "accuracy": 75.0, "accuracy first": 100.0, "accuracy second": 50.0, "accuracy letter": letter, "questions": 4,
    }  # fmt: skip
    assert [one.right for one in scored.samples] == [True, True, True, False] and scored.mistakes == 1
    np.testing.assert_array_equal(scored.samples[2].image, micro.examples()[5].image)
    assert scored.details()["95% interval"] == [30.06, 95.44]

    write_predictions(tmp_path / "new" / "predictions.jsonl", scored.answered)
    written = lines(tmp_path / "new" / "predictions.jsonl")
    assert [one["answer"] for one in written] == said and [one["score"] for one in written] == [1, 1, 1, 0]
    assert written[3] | {"source": "", "row": ""} == written[3] == {
        "index": 3, "question": "and now?", "answer": said[3], "references": [references[3]], "group": "second",
        "score": 0.0, "source": "", "row": "",
    }  # fmt: skip
    assert benchmarks.evaluate(run_folder, "own", limit=2).scores["questions"] == 2


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_an_engine_gives_the_answers_of_batches(run_folder, monkeypatch):
    """Prompts of several lengths and tiles, one that the engine has to grow for, and one that no model reads."""
    wide = Image.new("RGB", (96, 32), "red")
    items = [
        Item.of(wide, "is it " * 20, ""), Item.of(PICTURE, "what " * 600, ""), Item.of(PICTURE, "what is it?", ""),
    ]  # fmt: skip
    row = Benchmark(items=tuple, max_new_tokens=6, batch_size=2)
    said, engines = {}, []
    monkeypatch.setattr(
        asking, "GrowingEngine", lambda *given: engines.append(GrowingEngine(*given, 64)) or engines[-1]
    )
    for way in (asking.Way(), asking.Way(slots=2, dtype="float32")):
        loaded = way.load(run_folder, row.components).with_max_tiles(3)
        answered = list(way.of(row).answered(loaded, items))
        assert [isinstance(one, BadEvent) for one in answered] == [False, True, False]
        said[way] = [one.detail if isinstance(one, BadEvent) else one.answer for one in answered]
    batches, engine = said.values()
    assert batches == engine and all(batches) and engines[0].engine.length == 128


def test_what_an_engine_cannot_do_is_said(monkeypatch):
    made = []
    monkeypatch.setattr(asking, "through_engine", lambda *given: made.append(given) or says("x"))
    row = own_benchmark(exact)
    assert asking.Way(dtype="bfloat16").of(row) is row and not made
    for way in (asking.Way(dtype="int8"), asking.Way(3, "int8"), asking.Way(4)):
        assert way.of(row).ask is not row.ask
    assert made == [(asking.INT8_SLOTS, True), (3, True), (4, False)]
    with pytest.raises(UserError, match="no LLM answers this benchmark: leave --slots"):
        benchmarks.evaluate("runs/contrast", "easy_vqa_zero_shot", way=asking.Way(4))


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    items, asked, said = list(own_items()), [], []
    path, about = tmp_path / "predictions.jsonl", {"checkpoint": "a", "dtype": ""}

    def asking(*_):
        def answers(items):
            for item in items:
                asked.append(item.question)
                if len(asked) == 3:
                    raise KeyboardInterrupt
                yield BadSample("cannot_be_asked", "why") if len(asked) == 1 else f"answer {len(asked)}"

        return answers

    def go_on(about, items=items):
        with remembered(path, about, said.append) as memory:
            row = own_benchmark(exact, ask=memory.of(asking))
            return [one.detail if isinstance(one, BadEvent) else one.answer for one in row.answered(None, items)]

    with pytest.raises(KeyboardInterrupt):
        go_on(about)
    with (tmp_path / "predictions.jsonl.answers").open("a") as file:
        file.write('["and now?", "answ')  # was being written
    with pytest.raises(UserError, match="'what is it[?]' where 'why[?]' is asked: delete it"):
        go_on(about, [Item.of(PICTURE, "why?", "")])
    assert go_on(about) == ["why", "answer 2", "answer 4", "answer 5"] and not list(tmp_path.iterdir())
    assert said[-1] == f"{path}.answers has 2 answers: going on from there" and len(asked) == 5

    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        go_on(about)
    go_on(about | {"dtype": "int8"})
    assert said[-1].endswith("another evaluation (dtype was '' and is 'int8'): starting again") and len(asked) == 7


def test_every_stage_names_a_row_or_none():
    of_runs = {name for name, row in benchmarks.BENCHMARKS.items() if row.source}
    assert {stage.benchmark for stage in STAGES.values()} - {None} == of_runs
    for row in benchmarks.BENCHMARKS.values():
        assert set(row.components) <= {"embedding", "llm", "clip"}


def test_questions_of_easy_vqa_keep_their_words(monkeypatch):
    from hovle_jax.evaluation import easy_vqa

    monkeypatch.setattr(easy_vqa.easy_vqa, "load", lambda split: list(micro.examples()))
    items = list(easy_vqa.QUESTIONS.items())
    assert len(items) == 96 and [item.group for item in items[:4]] == ["colour", "shape", "yes/no", "yes/no"]
    assert items[0].question == "what color is the shape?" and items[0].references == ("black",)
    (caption,) = {item.question for item in easy_vqa.CAPTIONS.items()}
    assert caption == "describe the picture." and {item.question for item in easy_vqa.ZERO_SHOT.items()} == {""}
    parts = easy_vqa.ZERO_SHOT.parts
    assert [parts[name]("a blue circle") for name in ("colour", "shape")] == ["blue", "circle"]
    assert parts["shape"]("blue") == ""


def test_a_benchmark_that_cannot_be_asked_is_an_error(run_folder, monkeypatch):
    long = Item.of(PICTURE, "what " * 600, "x")
    monkeypatch.setitem(benchmarks.BENCHMARKS, "own", Benchmark(items=lambda: [long]))
    with pytest.raises(UserError, match=r"cannot be asked: the prompt has [\d,]+ tokens, those of 1 tile included"):
        benchmarks.evaluate(run_folder, "own")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of one's own


def asked(scorer=exact, **row):
    return items_of(parse(row), scorer)


def test_every_question_comes_after_the_turns_before_it():
    image = broken.encoded(0)
    row = dict(image=[image, image], conversations=[
        {"from": "system", "value": "be kind"}, *broken.turns("<image>\nwhat? ", " red", "and <image>?", "blue"),
    ])  # fmt: skip
    first, second = asked(**row)
    assert first.turns == (("<image>\nwhat?", None),) and len(first.images) == 1 and first.references == (" red",)
    assert second.turns == (("<image>\nwhat?", "red"), ("and <image>?", None)) and len(second.images) == 2
    assert first.system == second.system == "be kind" and second.question == "and <image>?"
    assert [len(item.images) for item in asked(image=[image] * 2, questions=["a", "b"], answers=["c", "d"])] == [2, 2]


def test_captions_references_and_options():
    (caption,) = asked(image=[broken.encoded(0), broken.encoded(1)], caption="a dog")
    assert caption.question == "describe the picture." and caption.references == ("a dog",) and len(caption.images) == 1
    (several,) = asked(question="what?", answers=["red", "dark red"])
    assert several.references == ("red", "dark red") and several.images == ()
    (beside,) = asked(conversations=broken.turns("what?", "red"), answers=["red", "crimson"])
    assert beside.references == ("red", "crimson")
    (chosen,) = asked(choice, question="which?", answer="B", choices={"A": "cat", "B": 3})
    assert chosen.options == ("cat", "3")
    for row, reason in (
        (dict(text="plain"), "no_question"), (dict(image=broken.encoded(0)), "no_question"),
        (dict(question="which?", answer="B"), "no_options"), (dict(image=b"x", caption="a dog"), "not_an_image"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=reason):
            asked(choice if "which?" in row.values() else exact, **row)


def test_a_sample_shows_the_reference_that_was_given():
    item = Item((), (("what?", None),), ("red", "crimson"))
    benchmark = Benchmark(items=tuple, ask=says("Crimson."))
    (answered,) = benchmark.answered(None, [item])
    assert answered.score == 1 and sample(answered).expected == "crimson" and sample(answered).right


class Echo:
    """A model of which nothing is asked."""

    def with_max_tiles(self, tiles):
        self.tiles = tiles
        return self


def says(text):
    return lambda *_: lambda items: (text for _ in items)


@pytest.mark.parametrize("kind", [*ROWS, "meta"])
def test_any_source_is_scored(kind, path_of, own_cache):
    entries = open_mixture(path_of(kind))
    benchmark = own_benchmark(exact, ask=says("it is number 3"))
    answered = list(own_data.ask_rows(Echo(), entries, benchmark))
    rows = sum(entry.used for entry in entries)
    assert len(answered) == rows and (kind == "meta" or rows == COUNT)
    right = [one for one in answered if one.score]
    assert {one.item.references for one in right} == {("it is number 3",)}
    assert len({one.item.where for one in answered}) == rows and len(answered[0].item.images) == 1
    assert len(list(own_data.ask_rows(Echo(), entries, benchmark, limit=5))) == 5


def test_each_source_has_its_own_limit_of_tiles(path_of, own_cache):
    seen = []
    ask = lambda loaded, *_: seen.append(loaded.tiles) or says("x")()
    list(own_data.ask_rows(Echo(), open_mixture(path_of("meta")), own_benchmark(exact, ask=ask)))
    assert sorted(set(seen), key=str) == [1, None]
    list(own_data.ask_rows(Echo(), open_mixture(path_of("meta")), own_benchmark(exact, ask=ask), max_tiles=3))
    assert set(seen[len(seen) // 2 :]) == {3}


def test_a_large_source_is_read_as_it_is_asked():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield Item.of(PICTURE, "?", str(i))

    answered = own_benchmark(exact, ask=says("7")).answered(None, items())
    assert next(answered).score == 0 and len(read) == 1
    assert sum(one.score for one in answered) == 1 and len(read) == 100


ROWS_OF_MINE = [
    {"image": "a.png", "conversations": broken.turns("<image>\nwhat?", "red", "and now?", "blue")},
    {"question": "hello?", "answers": ["x", "y"]},
    {"image": "absent.png", "caption": "a dog"},
    {"question": "what " * 600, "answer": "no"},
]


@pytest.mark.usefixtures("quick_compilation", "own_cache")
def test_own_rows_are_scored(run_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(broken.encoded(0))
    data, said = write_jsonl(tmp_path, ROWS_OF_MINE, "mine.v2.jsonl"), []
    scored, path = evaluate_data(run_folder, data, "vqa", max_new_tokens=4, say=said.append)
    assert path == run_folder / "predictions_mine_v2.jsonl" and not list(path.parent.glob("*.partial"))
    written = lines(path)
    assert [one["question"] for one in written] == ["<image>\nwhat?", "and now?", "hello?"]
    assert [one["references"] for one in written] == [["red"], ["blue"], ["x", "y"]]
    assert written[2]["source"] == data and written[2]["row"].startswith("line at byte ")
    assert scored.scores == {"score": 0.0, "questions": 3}
    assert scored.details()["bad rows"] == {"cannot_be_asked": 1, "missing_image": 1}
    bad = lines(run_folder / "bad_rows_mine_v2.jsonl")
    assert said == [f"2 rows or questions could not be asked; they are listed in {run_folder}/bad_rows_mine_v2.jsonl"]
    assert [one["reason"] for one in bad] == ["missing_image", "cannot_be_asked"] and "tokens" in bad[1]["detail"]

    rows = [*ROWS_OF_MINE[:1], {"question": "hello?", "answers": ["x", written[2]["answer"]]}]
    again, path = evaluate_data(run_folder, write_jsonl(tmp_path, rows), "exact", str(tmp_path / "out"), say=quiet,
                                max_new_tokens=4)  # fmt: skip
    assert path == tmp_path / "out" / "predictions.jsonl" and [one["score"] for one in lines(path)] == [0, 0, 1]
    assert [one["answer"] for one in lines(path)] == [one["answer"] for one in written]
    assert not (tmp_path / "out" / "bad_rows.jsonl").exists() and again.scores["score"] == 33.333


def test_what_cannot_be_scored_is_one_line(run_folder, tmp_path, own_cache):
    text = write_jsonl(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match=r"no row can be asked \(no_question 2\); the first is line at byte 0: neither"):
        evaluate_data(run_folder, text, "exact", str(tmp_path / "out"), say=quiet)
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(UserError, match="unknown scorer 'bleu'"):
        evaluate_data(run_folder, text, "bleu")
    with pytest.raises(UserError, match="no file at .*absent.jsonl"):
        evaluate_data(run_folder, str(tmp_path / "absent.jsonl"), "exact")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*predictions.jsonl.*--out"):
        evaluate_data(run_folder, text, "exact", str(tmp_path / "file"))


def test_where_predictions_go():
    names = {"rows.jsonl": "rows", "a/b.c.jsonl": "b_c", "corpus:test": "corpus_test", "s/{000..127}.tar": "000_127"}
    for data, name in names.items():
        assert predictions_path("runs/x", data).as_posix() == f"runs/x/predictions_{name}.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run


@pytest.mark.usefixtures("quick_compilation", "own_cache")
def test_a_run_on_own_data_is_scored_on_its_held_out_rows(run_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(broken.encoded(0, size=(640, 320)))
    held_out = write_jsonl(tmp_path, ROWS_OF_MINE)
    config = micro.run_config("instruct", data=dict(source="rows.jsonl", held_out=held_out), eval_limit=2)
    scored = summary.score_run(config, run_folder, "easy_vqa")
    assert summary.scores_of(scored) == {"accuracy on held-out rows": 0.0, "questions": 3, "standard error": 0.0}
    assert [None if one.image is None else one.image.shape for one in scored.samples] == [
        (160, 320, 3), (160, 320, 3), None,
    ]  # fmt: skip
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=""))
    assert summary.score_run(without, run_folder, "easy_vqa") is None
    assert summary.score_run(config, tmp_path, None) is None  # nothing there that answers


def test_a_benchmark_scores_runs_on_its_own_source(monkeypatch):
    called = []
    monkeypatch.setattr(summary, "evaluate", lambda *arguments: called.append(arguments))
    for limit in (0, 7):
        summary.score_run(micro.run_config("align", eval_limit=limit), "folder", "easy_vqa_captions")
    assert called == [("folder", "easy_vqa_captions", 240), ("folder", "easy_vqa_captions", 7)]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def of_size(tokens, tiles=1):
    return Sample(np.zeros(tokens, np.int32), np.zeros(tokens, bool), np.zeros((tiles, 1, 1, 3), np.uint8))


def test_prompts_much_alike_share_a_shape():
    shapes = Shapes()
    assert shapes.group({0: of_size(30), 1: of_size(41), 2: of_size(12, 0)}) == [([0, 1, 2], 48, 1)]
    assert shapes.group({0: of_size(20)}) == [([0], 48, 1)]  # as before: no other program
    assert shapes.group({0: of_size(50), 1: of_size(1000, 7), 2: of_size(600, 5)}) == [
        ([0], 64, 1), ([1, 2], 1008, 7),
    ]  # fmt: skip
    shapes.add_rows(5, 32)
    assert shapes.rows == 8
    shapes.add_rows(3, 32)
    shapes.add_rows(100, 32)
    assert shapes.rows == 32


def test_bad_rows_and_answers_keep_their_order():
    event = BadEvent(-1, "rows", "rows.jsonl", "1", "missing_image", "")
    answers = ["x", BadSample("cannot_be_asked", "why"), "x"]
    ask = lambda *_: lambda items: (answer for answer, _ in zip(answers, items))
    items = [Item((), (("?", None),), ("x",), where=("rows.jsonl", str(i))) for i in range(3)]
    found = list(Benchmark(items=tuple, ask=ask, scorer=vqa).answered(None, [items[0], event, *items[1:]]))
    assert [getattr(one, "score", None) for one in found] == [1, None, None, 1] and found[1] is event
    assert (found[2].sample, found[2].detail) == ("1", "why")
