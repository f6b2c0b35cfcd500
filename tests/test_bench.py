"""The command bench: its plan, its figures from what clients saw, and a run on a small model."""

import json
import types

import jax
import pytest
from PIL import Image

from hovle_jax.components import Models
from hovle_jax.errors import UserError
from hovle_jax.inference.bench import clients, figures, measure, subject, traffic
from hovle_jax.inference.bench.cases import QUICK, Case, Protocol, numbers, plan
from hovle_jax.model.presets import MODELS
from tests import micro
from tests.test_commands import command

LLM_ALONE = micro.run_config("pretrain").model_config.only(("llm",)).model


def test_the_plan_is_table_6_and_then_more_streams():
    paper = [(case.streams, case.tile_size) for case in plan(MODELS["hovle"](), Protocol())]
    assert paper == [(1, 336), (1, 448), (2, 448), (4, 448), (8, 448), (16, 448), (32, 448)]
    assert plan(MODELS["hovle"](), Protocol(streams=()))[0] == Case(1, 336, text_tokens=256, new_tokens=120)
    assert [case.tile_size for case in plan(micro.model_config(), QUICK)] == [32, 32]
    assert [case.tile_size for case in plan(micro.model_config(), QUICK, (48, 64))] == [48, 64, 64]
    assert plan(LLM_ALONE, QUICK) == (Case(1, 0, 16, 8), Case(2, 0, 16, 8))


@pytest.mark.parametrize(
    "asked, said",
    [
        (lambda: plan(micro.model_config(), QUICK, (100,)), "--tile_sizes has 100: .* multiple of patch_size=8"),
        (lambda: plan(micro.model_config(), QUICK, (40,)), "--tile_sizes has 40: .* 5x5 patch grid is odd"),
        (lambda: plan(LLM_ALONE, QUICK, (32,)), "--tile_sizes=32: this model is an LLM alone"),
        (lambda: plan(micro.model_config(), Protocol(text_tokens=500)), "504 tokens, those of 1 tile included"),
        (lambda: numbers("streams", "1,x"), "--streams=1,x: give whole numbers from 1 on"),
        (lambda: numbers("streams", "0"), "--streams=0: give whole numbers"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(asked, said):
    with pytest.raises(UserError, match=said):
        asked()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--quick"], "give --checkpoint, as runs/instruct, or --config"),
        (["--config", "configs/instruct.py", "--out", "TMP/file/out"], "no folder can be made there"),
        (
            ["--config", "configs/instruct.py", "--config.model.llm.stack.num_layer=1"],
            "num_layer; Did you mean num_layers",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, said):
    (tmp_path / "file").touch()
    result = command("bench", *(flag.replace("TMP", str(tmp_path)) for flag in flags), JAX_LOG_COMPILES="1")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1 and said in result.stderr


def test_figures_are_those_of_the_time_that_was_watched():
    """Two streams; of the first answers only what came after the start counts."""
    stream = lambda asked, *times: types.SimpleNamespace(asked=asked, times=times)
    asked = [
        stream(0.0, 5.0, 11.0, 12.0),
        stream(0.0, 6.0, 11.0, 12.0, 13.0),
        stream(12.0, 12.5, 14.0, 15.0),
        stream(13.0, 14.0),
        stream(15.0),
    ]
    seen, decoding = clients.Seen(10.0, 15.0, 4, asked, [], 7, 0), figures.Decoding([0.5, 0.25, 0.25], 16, 20.0)
    found = figures.figures(Case(2, 0, 16, 3), seen, 16, decoding, weight_bytes=60, read_bandwidth=160.0)
    assert (found.answers, found.tokens, found.seconds, found.tokens_per_second) == (4, 12, 5.0, 12 / 5)
    assert found.first_token_seconds.p50 == 0.75  # of those after 0.5 and after 1
    assert sorted(figures._between(seen)) == [1, 1, 1, 1, 1.5]
    assert found.between_tokens_seconds.p50 == 1 and found.tokens_per_second_a_stream == pytest.approx(5 / 5.5)
    assert (found.decoding_steps, found.decoding_seconds, found.tokens_per_second_decoding) == (3, 0.25, 8)
    assert found.share_of_bandwidth == 80 / 0.25 / 160 and found.programs_compiled_before == 7
    few = figures.figures(Case(2, 0, 16, 3), seen, 16, figures.Decoding([0.5, 0.25], 16, 20.0), 60, 160.0)
    assert few.decoding_seconds is few.share_of_bandwidth is few.tokens_per_second_decoding is None


def test_steps_of_decoding_alone_follow_one_that_read_nothing():
    steps = [(9, True, 1), (11, True, 2), (12, True, 3), (13, False, 4), (14, True, 5), (15, True, 6), (17, True, 2)]
    assert figures.decoding_steps(clients.Step(*step) for step in steps) == [(2, 2), (1, 3), (1, 6)]


def test_short_prompts_leave_steps_of_decoding_alone():
    hovle = Models(micro.run_config("instruct").model_config).hovle
    about, case = subject.Subject(hovle, {}, subject.NoText(319), 0, "float32"), Case(4, 48, 16, 6)
    assert not figures.decoding_steps(clients.watch(case, OneByOne(about.answerer(case)), 4, print).steps)
    alone = clients.watch_decoding(case, OneByOne(about.answerer(case)))
    assert len(figures.decoding_steps(alone.steps)) == 24 - 7 - 1  # of the first, which had 7 when all were read
    assert {(stream.reading.length, len(stream.reading.tiles)) for stream in alone.asked} == {(16, 0)}
    small = OneByOne(about.answerer(case))
    small.length = 3
    assert {len(stream.reading.tokens) for stream in clients.watch_decoding(case, small).asked} == {1}


@pytest.mark.parametrize("compiled, tried, left", [((5, 0), 1, 0), ((5, 1, 0), 2, 0), ((5, 1, 1, 1, 1), 3, 1)])
def test_time_in_which_something_was_compiled_is_not_measured(monkeypatch, compiled, tried, left):
    """`compiled`: programs by turn; the first turn is never measured."""
    case, made = Case(2, 0, 16, 8), []

    class Fake(clients.Clients):
        def answers(self):
            for number in range(100):
                made.append(number)
                yield number

    count = lambda: sum(compiled[: -(-len(made) // 2)])
    monkeypatch.setattr(clients, "Clients", Fake)
    monkeypatch.setattr(clients.compilations, "count", count)
    engine = types.SimpleNamespace(reset=lambda: None)
    seen = clients.watch(case, engine, 1, lambda line: None)
    assert len(made) == 2 + 2 * tried and seen.answers == 2
    assert seen.programs == left and seen.programs_before == sum(compiled[:tried])


def test_where_memory_ends_so_does_the_profile(monkeypatch):
    def measured(about, case, *_):
        if case.streams == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return types.SimpleNamespace(
            first_token_seconds=figures.Spread(1, 1, 1), tokens_per_second_a_stream=1.0, tokens_per_second=2.0
        )

    said = []
    monkeypatch.setattr(measure, "measure", measured)
    cases = plan(LLM_ALONE, Protocol(text_tokens=16))
    assert len(list(measure.measure_all(None, cases, 1, said.append))) == 2
    assert said[-1].startswith("4 streams: not enough memory on the device")


class OneByOne:
    """An engine that reads a prompt in two steps, and makes a token a step for those that it has read."""

    length = 40

    def __init__(self, answerer):
        self.answerer, self.waiting, self.answering, self.most, self.was_reading = answerer, [], [], 0, []

    def enqueue(self, stream):
        self.waiting.append([stream, 2])

    def step(self):
        self.most = max(self.most, len(self.waiting) + len(self.answering))
        self.was_reading.append(bool(self.waiting))
        if self.waiting:
            self.waiting[0][1] -= 1
            if not self.waiting[0][1]:
                self.answering.append(self.waiting.pop(0)[0])
        for stream in self.answering:
            stream.take(7, -1.0)
        self.answering = [stream for stream in self.answering if not stream.finish]

    def run(self):
        pass

    def reset(self):
        self.waiting, self.answering = [], []


def test_clients_ask_again_as_soon_as_they_are_answered():
    hovle = Models(micro.run_config("instruct").model_config).hovle
    about, case = subject.Subject(hovle, {}, subject.NoText(319), 0, "float32"), Case(2, 48, 16, 6)
    engine = OneByOne(about.answerer(case))
    seen = clients.watch(case, engine, 3, lambda line: None)
    assert seen.answers == 4 and engine.most == 2 and not seen.programs
    done = [stream for stream in seen.asked if stream.finish]
    assert len(done) == 2 + 4 and [len(stream.times) for stream in done] == [6] * 6
    assert [step.is_alone for step in seen.steps] == [not was for was in engine.was_reading]
    readings = [stream.reading for stream in seen.asked]
    assert {(reading.length, reading.tiles.shape) for reading in readings} == {(9 + 16, (1, 48, 48, 3))}
    assert len({reading.tiles.tobytes() for reading in readings}) == len(readings)
    assert all((reading.tokens[9:] != 319).all() and (reading.tokens[:9] == 319).all() for reading in readings)


def test_bytes_are_those_that_the_engine_holds():
    """HD in int8: the caches of its stacks differ in length, and both count."""
    about = subject.random(micro.run_config("instruct", "post").model_config, "int8")
    layers, head = about.params["layers"], about.params["head"]
    assert head.fine.dtype == "int8" and layers["llm"][1].ffn_norm.dtype == "float32"
    assert (layers["llm"][1].ffn_norm == 1).all()
    assert traffic.weight_bytes(about.params) == sum(leaf.nbytes for leaf in jax.tree.leaves((layers, head.coarse)))
    _, case = plan(about.hovle.config, Protocol((2,), text_tokens=300, new_tokens=100))
    short, long = 300 + 4, 300 + 16  # of caches for 404 + 256 and 416 + 256 tokens, too few for 512 to be a part
    a_token = 2 * 2 * (2 * 2 * 8 * 2)  # slots, layers; key and value, heads, numbers of bfloat16
    engine = about.engine(case)
    assert traffic.cache_bytes(engine, short, long, [50]) == a_token * (660 + 672)
    assert traffic.cache_bytes(engine, 100, 110, [5, 40]) == a_token * (128 + 256) / 2 + a_token * (128 + 256) / 2


def test_the_command_on_a_finished_run(tmp_path):
    run = micro.finished_run(tmp_path / "run")
    flags = ["--checkpoint", run, "--quick", "--streams=1", "--answers=3", "--out", tmp_path / "out"]
    done = command("bench", *flags, timeout=400)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert made["model"] == {
        "name": "run", "parameters": made["model"]["parameters"], "dtype": "float32",
        "layers": {"embedding": 2, "llm": 2}, "width": 32,
    }  # fmt: skip
    assert made["machine"]["device_count"] == 1 and made["machine"]["jax"] and "bench" in made["command"]
    (case,) = made["cases"]
    assert (case["streams"], case["tile_size"], case["prompt_tokens"], case["answers"]) == (1, 32, 16 + 4, 3)
    assert case["tokens"] == case["answers"] * case["new_tokens"] == 3 * 8
    assert case["programs_compiled"] == 0 < case["programs_compiled_before"]
    for name in ("first_token_seconds", "between_tokens_seconds"):
        assert 0 < case[name]["p50"] <= case[name]["p90"] <= case[name]["p99"] < case["seconds"]
    assert case["tokens_per_second"] == pytest.approx(case["tokens"] / case["seconds"])
    stack, head = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32, 32 * 320
    assert case["weight_bytes"] == 4 * (4 * stack + head)
    read = (case["weight_bytes"] + case["cache_bytes"]) / case["decoding_seconds"]
    assert case["share_of_bandwidth"] == pytest.approx(read / case["read_bandwidth"])
    assert Image.open(tmp_path / "out" / "bench.png").size[0] > 600
    assert "[1/1] 1 stream, tile of 32 pixels" in done.stderr and "1    32" in done.stdout
