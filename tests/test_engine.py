"""The engine's answers are those of the plain full forward: chunked, side by side, one after another, from a prefix."""

import dataclasses

import jax
import numpy as np
import pytest

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Engine, Request, Stream, slots_bytes
from hovle_jax.inference.generate import Prompt, prompt_batch, prompt_samples
from hovle_jax.inference.memory import size
from hovle_jax.inference.sampling import Sampling
from hovle_jax.inference.texts import TextSoFar
from hovle_jax.inference.warming import warm_up
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.presets import MODELS
from hovle_jax.system import compilations
from tests import micro
from tests.test_decode import VARIANTS, longer, make_answerer, prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = 6
SETTINGS = dict(slots=2, length=160, tiles=4, chunks=(8, 32))


def check_greedy(answerer, streams, asked):
    """Each token is the most likely one after the prompt and the tokens before it, by a forward of the whole."""
    samples = [longer(s, stream.tokens) for s, stream in zip(prompt_samples(answerer, asked), streams)]
    logits = np.asarray(jax.jit(answerer.hovle.logits)(answerer.params, prompt_batch(answerer, samples)))
    for row, sample, stream in zip(logits, samples, streams):
        n = len(sample.tokens) - len(stream.tokens)
        before = row[n - 1 : len(sample.tokens) - 1]
        assert stream.tokens == before.argmax(-1).tolist()
        np.testing.assert_allclose(
            stream.logprobs, np.asarray(jax.nn.log_softmax(before))[range(len(before)), stream.tokens], atol=1e-4
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_are_those_of_the_full_forward(name):
    answerer = make_answerer(**VARIANTS[name])
    engine = Engine(answerer, **SETTINGS)
    asked = [*prompts(), Prompt.of("and now?"), *prompts()[:1]]  # more than there are slots
    streams = [engine.submit(prompt, Request(max_new_tokens=NEW + i)) for i, prompt in enumerate(asked)]
    engine.run()
    assert all(stream.finish in ("length", "stop") for stream in streams)
    assert len({tuple(stream.tokens[:NEW]) for stream in streams}) > 1
    check_greedy(answerer, streams, asked)


def answers(engine, asked, requests):
    streams = [engine.submit(prompt, request) for prompt, request in zip(asked, requests)]
    engine.run()
    return streams


def test_a_seeded_request_makes_the_same_tokens_alone_and_in_company():
    answerer, asked = make_answerer(), prompts()
    requests = [Request(8, Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=i)) for i in range(3)]
    together = answers(Engine(answerer, **SETTINGS), asked, requests)
    engine = Engine(answerer, **SETTINGS)
    alone = [answers(engine, [prompt], [request])[0] for prompt, request in zip(asked, requests)]
    assert [stream.tokens for stream in together] == [stream.tokens for stream in alone]
    other = answers(engine, asked[:1], [Request(8, Sampling(temperature=1.0, seed=99))])
    assert other[0].tokens != alone[0].tokens


@pytest.mark.parametrize("variant", ["pre", "post"])
def test_a_conversation_reads_what_is_new(variant):
    """The second turn finds the first one, with its image, in a slot; another image it does not."""
    answerer = make_answerer(variant)
    engine = Engine(answerer, **SETTINGS)
    first, second = (example.image for example in micro.examples()[:2])
    (begun,) = answers(engine, [Prompt.of("what color is the shape?", first)], [Request(NEW)])
    said = answerer.tokenizer.decode(begun.tokens)
    turns = (("what color is the shape?", said), ("and its shape?", None))
    asked = [Prompt(turns, (first,)), Prompt(turns, (second,))]
    same, other = (answers(engine, [prompt], [Request(NEW)])[0] for prompt in asked)
    tokens_per_tile = answerer.hovle.config.embedding.tokens_per_tile
    assert same.reused >= begun.reading.length > other.reused > 0
    assert other.reused <= begun.reading.length - tokens_per_tile
    check_greedy(answerer, [begun], [Prompt.of("what color is the shape?", first)])
    check_greedy(answerer, [same, other], asked)


def test_a_prompt_asked_again_reads_its_last_token_alone():
    engine, asked = Engine(make_answerer("post"), **SETTINGS), prompts()[2]
    first, again = (answers(engine, [asked], [Request(NEW)])[0] for _ in range(2))
    assert again.reused == again.reading.length - 1 and again.tokens == first.tokens


def test_answers_end_where_they_are_told_to():
    answerer = make_answerer()
    engine = Engine(answerer, **SETTINGS)
    prompt = prompts()[0]
    (free,) = answers(engine, [prompt], [Request(12)])
    assert free.finish == "length" and len(free.text) > 4
    (by_id,) = answers(engine, [prompt], [Request(12, stop_ids=(free.tokens[3],))])
    assert by_id.finish == "stop" and by_id.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    end = free.text[3:5]
    pieces = []
    by_text = engine.submit(prompt, Request(12, stops=(end,)), pieces.append)
    engine.run()
    assert by_text.finish == "stop" and by_text.text == "".join(pieces) == free.text[: free.text.index(end)].rstrip()


def test_a_cancelled_answer_leaves_its_slot_to_the_next():
    answerer = make_answerer()
    engine = Engine(answerer, **SETTINGS | dict(slots=1))
    asked = prompts()
    streams = [engine.submit(prompt, Request(20)) for prompt in asked]
    while len(streams[0].tokens) < 2:
        engine.step()
    engine.cancel(streams[0])  # while it is answered
    engine.step()
    engine.cancel(streams[1])  # while its prompt is read
    engine.run()
    assert [stream.finish for stream in streams] == ["cancelled", "cancelled", "length"]
    assert len(streams[0].tokens) < 20 and not streams[1].tokens
    check_greedy(answerer, streams[2:], asked[2:])


def test_prompts_are_read_first_where_that_is_asked_for():
    answerer = make_answerer()
    engine = Engine(answerer, **SETTINGS)
    asked = prompts()[: engine.num_slots]
    assert len(asked) > 1
    streams = [engine.submit(prompt, Request(NEW)) for prompt in asked]
    engine.step(prompts_first=True)
    engine.step(prompts_first=True)
    assert all(stream.tokens for stream in streams)
    engine.run()
    check_greedy(answerer, streams, asked)


@pytest.mark.slow
def test_nothing_is_compiled_for_prompts_like_those_before():
    engine = Engine(make_answerer("post"), **SETTINGS | dict(chunks=(8, 24)))  # shapes of its own
    compilations.count()  # begins to count
    compilations.count()
    answers(engine, prompts(), [Request(NEW)] * 3)
    answers(engine, prompts(), [Request(NEW, Sampling(0.5, seed=1))] * 3)  # greedy steps have programs of their own
    before = compilations.count()
    assert before > 0
    answers(engine, [*prompts()[::-1], Prompt.of("and now?")], [Request(NEW + 2, Sampling(0.7, seed=3))] * 4)
    assert compilations.count() == before


@pytest.mark.parametrize("name", ["post"])  # which has programs of both streams
def test_a_warm_engine_compiles_nothing_for_any_request(name):
    answerer = make_answerer(name)
    engine = Engine(answerer, slots=2, length=150, tiles=3, chunks=(40,))  # shapes of its own
    warmed = warm_up(engine)
    assert warmed.programs > 10 and warmed.length == 150 and engine.num_free == 2
    before = compilations.count()
    images = [example.image for example in micro.examples()[:5]]
    asked = [Prompt.of("what? " * n, *images[: n % 4]) for n in (1, 2, 5, 11, 20)]
    asked += [Prompt((("what is it?", "red"), ("and now?", None)), tuple(images[:1])), Prompt.of("a " * 60)]
    drawn = [Sampling(temperature=i / 5, top_p=0.9, seed=i) for i in range(len(asked))]
    streams = [
        engine.submit(prompt, Request(300, sampling, top_logprobs=i % 3, may_be_shorter=True))
        for i, (prompt, sampling) in enumerate(zip(asked, drawn))
    ]
    for _ in range(30):
        engine.step()
    engine.cancel(streams[0])
    engine.run()
    assert {stream.finish for stream in streams} <= {"length", "stop", "cancelled"}
    assert compilations.count() == before
    check_greedy(answerer, answers(engine, asked[1:2], [Request(NEW)]), asked[1:2])


def test_warming_ends_when_it_is_told_to():
    engine = Engine(make_answerer(), **SETTINGS)
    asked = []
    warm_up(engine, is_over=lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3 and engine.num_free == 2


def test_an_answer_may_have_what_the_prompt_leaves():
    engine = Engine(make_answerer(), **SETTINGS)
    wish = Request(500, may_be_shorter=True)
    fits = engine.prepare(Prompt.of("hello"), wish)
    assert fits.reading.length + fits.request.max_new_tokens == 160
    assert engine.prepare(Prompt.of("hello"), dataclasses.replace(wish, max_new_tokens=7)).request.max_new_tokens == 7
    with pytest.raises(UserError, match="its answer may have 1: the engine was made for 160 tokens"):
        engine.prepare(Prompt.of("what " * 200), wish)


def test_the_most_likely_tokens_are_the_models_own_whatever_is_drawn():
    answerer, asked = make_answerer(), prompts()
    hot = Sampling(temperature=1.5, repetition_penalty=1.3, top_k=9, seed=4)
    requests = [Request(NEW, top_logprobs=20), Request(NEW, hot, top_logprobs=3), Request(NEW)]
    streams = answers(Engine(answerer, **SETTINGS), asked, requests)
    samples = [longer(s, stream.tokens) for s, stream in zip(prompt_samples(answerer, asked), streams)]
    logits = jax.jit(answerer.hovle.logits)(answerer.params, prompt_batch(answerer, samples))
    for row, sample, stream in zip(np.asarray(jax.nn.log_softmax(logits)), samples, streams):
        n, count = len(sample.tokens), stream.request.top_logprobs
        assert len(stream.tops) == len(stream.tokens)
        for logp, tops in zip(row[n - len(stream.tokens) - 1 : n - 1], stream.tops):
            best = np.argsort(-logp)[:count]
            assert [token for token, _ in tops] == best.tolist()
            np.testing.assert_allclose([value for _, value in tops], logp[best], atol=1e-4)
    assert [tops[0][0] for tops in streams[0].tops] == streams[0].tokens
    assert [tops[0][0] for tops in streams[1].tops] != streams[1].tokens  # drawn
    with pytest.raises(UserError, match="top_logprobs=21: from 0 to 20"):
        Request(top_logprobs=21)


def test_an_int8_cache_takes_half_and_makes_the_same_tokens():
    """Teacher-forced: after each beginning of a float32 answer it chooses the next two tokens."""
    answerer, asked = make_answerer(), prompts()
    plain, engine = Engine(answerer, **SETTINGS), Engine(answerer, **SETTINGS | dict(chunks=(32,)), cache="int8")
    caches = [size((e._state.embedding, e._state.llm)) for e in (plain, engine)]
    assert caches[1] == caches[0] * (8 + 2) // (8 * 4)  # 8 numbers and a scale, in place of 8 in float32
    answered = answers(plain, asked, [Request(24)] * 3)
    same, total = 0, 0
    for round_ in range(2):
        before = compilations.count()
        for sample, stream in zip(prompt_samples(answerer, asked), answered):
            for i in range(0, 24, 2):
                reading = engine._read(longer(sample, stream.tokens[:i]))
                forced = Stream(reading, Request(2), (), TextSoFar(answerer.tokenizer), lambda piece: None)
                engine.enqueue(forced)
                engine.run()
                same += sum(ours == theirs for ours, theirs in zip(forced.tokens, stream.tokens[i:]))
                total += 2
    assert compilations.count() == before  # of the second round
    assert total == 144 and same >= 0.98 * total, same


def test_an_int8_cache_of_the_full_shape_takes_half_of_bfloat16():
    hovle = HoVLE(MODELS["hovle"](), Execution(dtype="bfloat16"))
    plain, int8 = (slots_bytes(hovle, 8, 4096, cache=cache) for cache in ("", "int8"))
    assert 0.5 < int8 / plain < 0.52


def test_a_second_answer_to_a_prompt_that_was_read_once():
    engine, prompt = Engine(make_answerer(), **SETTINGS), prompts()[0]
    sampling = Sampling(temperature=1.0, seed=3)
    first = engine.submit(prompt, Request(NEW))
    second = engine.enqueue(engine.another(first, sampling))
    engine.run()
    assert second.reading is first.reading
    assert second.tokens == answers(engine, [prompt], [Request(NEW, sampling)])[0].tokens != first.tokens


def test_what_does_not_fit_is_refused():
    engine = Engine(make_answerer("post"), **SETTINGS)
    with pytest.raises(UserError, match="the engine was made for 160 tokens and 4 tiles"):
        engine.submit(Prompt.of("hello"), Request(150))
    with pytest.raises(UserError, match=r"for 160 tokens; ask for less"):  # tiles are no limit of their own here
        Engine(make_answerer(), **SETTINGS).submit(Prompt.of("hello"), Request(150))
    with pytest.raises(UserError, match=r"9 stop ids, .* at most 8"):
        engine.submit(Prompt.of("hello"), Request(5, stop_ids=tuple(range(300, 307))))
