"""The server, by its own protocol: answers, streams, images, refusals, limits, cancelling, metrics."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Engine, Request
from hovle_jax.inference.generate import Prompt
from hovle_jax.serving import images
from hovle_jax.serving.app import Server
from hovle_jax.serving.entrance import Entrance
from hovle_jax.serving.job import Job
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.metrics import Metrics
from hovle_jax.serving.opening import key_of, listen
from hovle_jax.serving.worker import Worker
from tests import micro
from tests.benchmarks import serve_load
from tests.test_decode import make_answerer

testclient = pytest.importorskip("starlette.testclient")
pytestmark = pytest.mark.usefixtures("quick_compilation")

URL = "/v1/chat/completions"
LIMITS = Limits(
    body_bytes=200_000, pixels=10_000, request_pixels=18_000, images=3, characters=5_000, new_tokens=40, queue=4,
    seconds=600,
)  # fmt: skip


def engine():
    return Engine(make_answerer(), slots=2, length=200, chunks=(8, 32))


@contextlib.contextmanager
def serving(limits=LIMITS, key="", prepare=lambda is_over: None):
    worker = Worker(engine(), limits, Metrics(), prepare)
    server = Server(worker, "tiny", lambda token: str(token), limits, key)
    with testclient.TestClient(server.app()) as client:
        client.worker = worker
        yield client
    assert worker.stop(30)


@pytest.fixture(scope="module")
def client():
    with serving() as made:
        yield made


def data_url(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def said(text, *urls, **image):
    parts = [{"type": "text", "text": text}]
    return [
        {"role": "user", "content": parts + [{"type": "image_url", "image_url": {"url": u, **image}} for u in urls]}
    ]


def body(messages="hello", **more):
    messages = said(messages) if isinstance(messages, str) else messages
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6, **more}


def expected(prompt, new=6):
    made = engine()
    stream = made.submit(prompt, Request(new))
    made.run()
    return stream


def test_a_completion_is_the_engines_answer(client):
    picture = micro.examples()[3].image
    for messages, prompt in (
        (said("hello"), Prompt.of("hello")),
        ([{"role": "user", "content": "hello"}], Prompt.of("hello")),
        # Text before its images, as some clients send it: the model wants images first.
        (said("what is it?", data_url(picture)), Prompt.of("what is it?", picture)),
        (
            [{"role": "system", "content": "be kind"}, *said("a?"), {"role": "assistant", "content": "b"}, *said("c?")],
            Prompt((("a?", "b"), ("c?", None)), system="be kind"),
        ),
    ):
        reply = client.post(URL, json=body(messages))
        assert reply.status_code == 200, reply.text
        wanted, (choice,) = expected(prompt), reply.json()["choices"]
        assert choice["message"] == {"role": "assistant", "content": wanted.text}
        assert choice["finish_reason"] == wanted.finish
        usage = reply.json()["usage"]
        assert usage["prompt_tokens"] == wanted.reading.length and usage["completion_tokens"] == len(wanted.tokens)


def test_an_answer_may_be_as_long_as_what_is_left():
    """VLMEvalKit asks for 32,768 tokens of every model."""
    with serving(dataclasses.replace(LIMITS, new_tokens=4096)) as client:
        reply = client.post(URL, json=body(max_tokens=32768))
        assert reply.status_code == 200, reply.text
        tokens, length = reply.json()["usage"]["total_tokens"], client.worker.engine.length
        ended_by_length = reply.json()["choices"][0]["finish_reason"] == "length"
        assert tokens == length if ended_by_length else tokens < length
        too_long = client.post(URL, json=body("hello " * 200, max_tokens=32768))
        assert too_long.status_code == 400 and "tokens" in too_long.json()["error"]["message"]


def test_a_top_p_of_0_is_the_most_likely_token(client):
    greedy, none = (client.post(URL, json=body(**more)).json() for more in ({}, {"top_p": 0, "temperature": 2.0}))
    assert none["choices"] == greedy["choices"]


def events(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_has_the_pieces_of_the_same_answer(client):
    whole = client.post(URL, json=body(max_tokens=12)).json()["choices"][0]["message"]["content"]
    reply = client.post(URL, json=body(max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert reply.headers["content-type"].startswith("text/event-stream")
    *parts, counts = events(reply)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0]["role"] == "assistant" and parts[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(delta.get("content", "") for delta in deltas) == whole and len(deltas) > 3
    assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == 12


def test_several_answers_seeds_stops_and_logprobs(client):
    drawn = body(temperature=1.5, seed=5, n=3)
    first, again = (client.post(URL, json=drawn).json()["choices"] for _ in range(2))
    assert first == again and len({choice["message"]["content"] for choice in first}) > 1
    alone = client.post(URL, json=body(temperature=1.5, seed=6)).json()["choices"][0]["message"]
    assert alone == first[1]["message"]
    whole = client.post(URL, json=body(logprobs=True)).json()["choices"][0]
    listed = whole["logprobs"]["content"]
    assert len(listed) == 6 and all(row["logprob"] <= 0 for row in listed)
    stop = whole["message"]["content"][2:4]
    ended = client.post(URL, json=body(stop=[stop])).json()["choices"][0]
    assert ended["finish_reason"] == "stop" and stop not in ended["message"]["content"]


def test_the_budget_of_tiles_is_the_requests(client):
    wide = np.concatenate([example.image for example in micro.examples()[:3]], axis=1)
    per_tile = make_answerer().hovle.config.embedding.tokens_per_tile

    def read(**image):
        usage = client.post(URL, json=body(said("what?", data_url(wide), **image))).json()["usage"]
        return usage["prompt_tokens"]

    one = read(detail="low")
    assert read(max_dynamic_patch=3) == one + 3 * per_tile  # three tiles and a thumbnail
    assert read(max_dynamic_patch=2) == one + 2 * per_tile
    assert read() == read(max_dynamic_patch=12) and read(max_dynamic_patch=1) == one


def test_a_stream_tells_the_log_probabilities_that_the_whole_answer_tells(client):
    asked = body(max_tokens=12, logprobs=True, n=2, seed=1, temperature=1.5)
    whole = [choice["logprobs"]["content"] for choice in client.post(URL, json=asked).json()["choices"]]
    options = {"include_usage": True}
    *parts, counts = events(client.post(URL, json=asked | {"stream": True, "stream_options": options}))
    told = [[], []]
    for part in parts:
        assert part["usage"] is None
        (choice,) = part["choices"]
        told[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    assert [[row["token"] for row in rows] for rows in told] == [[row["token"] for row in rows] for rows in whole]
    assert counts["usage"]["completion_tokens"] == sum(map(len, whole)) == 24
    bytes_ = [row["bytes"] for rows in whole for row in rows]
    assert all(value is None or bytes(value).decode() for value in bytes_) and any(bytes_)


def test_the_most_likely_tokens_are_told_beside_each_token(client):
    asked = body(logprobs=True, top_logprobs=4)
    (choice,) = client.post(URL, json=asked).json()["choices"]
    rows = choice["logprobs"]["content"]
    for row in rows:
        assert [len(row["top_logprobs"]), row["top_logprobs"][0]] == [4, {k: row[k] for k in row if k[:3] != "top"}]
        values = [top["logprob"] for top in row["top_logprobs"]]
        assert values == sorted(values, reverse=True) and len({top["token"] for top in row["top_logprobs"]}) == 4
    parts = events(client.post(URL, json=asked | {"stream": True}))
    told = [row for part in parts for row in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == rows
    (without,) = client.post(URL, json=body(logprobs=True)).json()["choices"]
    assert all(row["top_logprobs"] == [] for row in without["logprobs"]["content"])


def test_without_a_limit_an_answer_has_the_room_that_is_left():
    with serving(dataclasses.replace(LIMITS, new_tokens=2_000)) as roomy:
        asked = body("hello")
        del asked["max_tokens"]
        for more in ({}, {"max_tokens": 500}):
            assert roomy.post(URL, json=asked | more).json()["usage"]["total_tokens"] == 200


BROKEN = {
    "no JSON": ("{", 400, "no JSON"),
    "a list": ([], 400, "must be a JSON object"),
    "no messages": ({"model": "tiny"}, 400, "messages"),
    "an unknown field": (body(frobnicate=1), 400, "frobnicate is not supported"),
    "tools": (body(tools=[{"type": "function"}]), 400, "tools is not supported"),
    "another model": (body(model="gpt"), 404, "'gpt' does not exist here; it is 'tiny'"),
    "a json object": (body(response_format={"type": "json_object"}), 400, "only text is made, not 'json_object'"),
    "most likely tokens": (body(logprobs=True, top_logprobs=21), 400, "top_logprobs=21: from 0 to 20"),
    "top_logprobs alone": (body(top_logprobs=2), 400, "only with logprobs"),
    "options of no stream": (body(stream_options={"include_usage": True}), 400, "only with stream"),
    "no options": (body(stream=True, stream_options=3), 400, "stream_options: an object"),
    "a stream": (body(stream="yes"), 400, "stream='yes': true or false"),
    "stops": (body(stop=["a"] * 17), 400, "stop: at most 16 texts"),
    "no stop": (body(stop=[""]), 400, "stop: a text"),
    "no answer": (body(n=0), 400, "n=0: from 1 to 16"),
    "no token": (body(max_completion_tokens=0), 400, "max_completion_tokens=0: at least 1"),
    "no end": ('{"messages": [], "seed": Infinity}', 400, "seed=inf: a number"),
    "an unknown field of an image": (
        {"messages": said("a", "data:,", max_tiles=3)},
        400,
        "image_url.max_tiles is not supported: known are url, detail",
    ),
    "many digits": ('{"messages": [], "temperature": 1' + "0" * 400 + "}", 400, "a number is needed"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
    "a tool's call": (body([*said("a"), {"role": "assistant", "tool_calls": [{}]}]), 400, "tool_calls are not"),
    "a port": (body(said("?", "http://example.org:99999/")), 400, "image_url: no URL"),
    "pixels together": (body(said("?", *[data_url(np.zeros((99, 99, 3), np.uint8))] * 2)), 413, "pixels together"),
    "a long text": (body("x" * 6000), 413, "more than 5,000 characters"),
    "a temperature": (body(temperature="hot"), 400, "temperature='hot'"),
    "below zero": (body(temperature=-1), 400, "temperature=-1"),
    "no tokens": (body(max_tokens=0.5), 400, "max_tokens=0.5"),
    "too many answers": (body(n=17), 400, "n=17: from 1 to 16"),
    "the assistant last": (body([*said("a"), {"role": "assistant", "content": "b"}]), 400, "the last one"),
    "a part": (body([{"role": "user", "content": [{"type": "audio"}]}]), 400, "'audio'"),
    "a broken image": (body(said("?", "data:image/png;base64,aGVsbG8=")), 400, "not_an_image"),
    "broken base64": (body(said("?", "data:image/png;base64,%%%")), 400, "base64 is broken"),
    "a file": (body(said("?", "file:///etc/passwd")), 400, "a data URL is needed"),
    "a host": (body(said("?", "http://example.org/a.png")), 403, "example.org are not allowed"),
    "a bomb": (body(said("?", data_url(np.zeros((200, 200, 3), np.uint8)))), 413, "200 x 200 pixels"),
    "too many images": (body(said("?", *[data_url(np.zeros((4, 4, 3), np.uint8))] * 4)), 413, "4 images; at most 3"),
    "a long prompt": (body("word " * 300), 400, "tokens"),
    "a large body": (body("x" * 300_000), 413, "more than 200,000 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_served_is_said(client, name):
    sent, status, message = BROKEN[name]
    content = sent if isinstance(sent, str) else json.dumps(sent)
    reply = client.post(URL, content=content)
    assert reply.status_code == status and message in reply.json()["error"]["message"], reply.text
    assert client.post(URL, json=body()).status_code == 200


def test_the_key_opens_all_but_the_page():
    with serving(key="secret") as closed:
        assert closed.post(URL, json=body()).status_code == 401
        assert closed.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert closed.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert closed.get("/health").status_code == 200 and "<title>tiny</title>" in closed.get("/").text


def test_models_health_metrics(client):
    client.post(URL, json=body())
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == 200
    assert client.get("/health").json() == {"status": "ok"}
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["hovle_made_tokens_total"]) >= 6 and float(lines["hovle_slots"]) == 2
    assert float(lines['hovle_requests_total{finish="length"}']) >= 1
    assert lines['hovle_request_seconds_bucket{le="+Inf"}'] == lines["hovle_request_seconds_count"]


def test_a_model_by_its_name_and_paths_that_are_none(client):
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    for reply, status in ((client.get("/v1/models/gpt"), 404), (client.post("/v1/x"), 404), (client.get(URL), 405)):
        assert reply.status_code == status and reply.json()["error"]["type"] == "invalid_request_error"


def test_an_error_of_the_engine_ends_its_requests_and_no_others(capsys):
    with serving() as client:
        good = client.post(URL, json=body()).json()["choices"]
        inner = client.worker.engine
        step, inner.step = inner.step, lambda: [inner._admit(), inner._read_chunk(), 1 // 0]
        whole = client.post(URL, json=body("another one"))
        stream = client.post(URL, json=body("and one more", stream=True))
        inner.step = step
        for reply in (whole, stream):
            assert reply.status_code == 500 and reply.json()["error"]["message"] == "the engine failed; try again"
        assert inner.num_free == 2 and client.get("/health").status_code == 200
        assert client.post(URL, json=body()).json()["choices"] == good
        assert "hovle_engine_errors_total 2" in client.get("/metrics").text
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_until_it_is_warm_requests_wait():
    warm = threading.Event()
    with serving(prepare=lambda _: warm.wait(60) and None) as cold:
        reply = cold.get("/health")
        assert reply.status_code == 503 and reply.json() == {"status": "warming up"}
        threading.Timer(0.2, warm.set).start()
        assert cold.post(URL, json=body()).status_code == 200
        assert cold.get("/health").status_code == 200


def test_a_worker_that_is_stopped_does_not_finish_warming():
    began, asked = threading.Event(), []

    def prepare(is_over):
        began.set()
        while not is_over():
            time.sleep(0.01)
        asked.append(is_over())

    worker = Worker(engine(), LIMITS, Metrics(), prepare)
    assert began.wait(30) and worker.stop(30) and asked == [True]


def test_nobody_waits_for_an_engine_that_has_ended(capsys):
    broken = threading.Event()
    with serving(prepare=lambda _: broken.wait(60) and 1 // 0) as dead:
        threading.Timer(0.2, broken.set).start()
        assert dead.post(URL, json=body()).status_code == 503
        assert dead.post(URL, json=body()).status_code == 503
        assert dead.get("/health").json() == {"status": "the engine has ended"}


class Sending:
    """A request whose body comes in parts, with a pause before each."""

    def __init__(self, *parts, pause=0.0):
        self._parts, self._pause = parts, pause

    async def stream(self):
        for part in self._parts:
            await asyncio.sleep(self._pause)
            yield part


def test_bodies_have_limits_of_their_own():
    limits = Limits(body_bytes=10, body_seconds=0.05, held_bytes=12, threads=1, preparing=2)

    async def check():
        entrance, leave = Entrance(limits), threading.Event()
        assert await entrance.prepared(Sending(b"ab", b"cd"), bytes.decode) == "abcd"
        with pytest.raises(Refused, match="did not come within 0.05 seconds") as slow:
            await entrance.prepared(Sending(b"a", b"b", pause=0.04), bytes.decode)
        with pytest.raises(Refused, match="more than 10 bytes") as large:
            await entrance.prepared(Sending(b"abcdefgh", b"ijk"), bytes.decode)
        held = [asyncio.create_task(entrance.prepared(Sending(b"abcd"), lambda body: leave.wait(30))) for _ in "ab"]
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="2 requests are being read already") as crowded:
            await entrance.prepared(Sending(b"ab"), bytes.decode)
        with pytest.raises(Refused, match="too many bytes") as heavy:
            await entrance.prepared(Sending(b"abcde"), bytes.decode)
        held[0].cancel()  # a client that goes away leaves its thread busy
        leave.set()
        assert await held[1] is True
        assert [e.value.status for e in (slow, large, crowded, heavy)] == [408, 413, 429, 503]
        assert heavy.value.headers and not slow.value.headers
        assert await entrance.prepared(Sending(b"abcdefghij"), bytes.decode) == "abcdefghij"  # all is given back

    asyncio.run(check())


def test_a_bomb_is_not_opened(monkeypatch):
    """A small file of a billion pixels: refused by its header."""
    monkeypatch.setattr(images, "decode_image", lambda data: pytest.fail("decoded"))
    for side, said in ((20_000, "400,000,000|decompression_bomb"), (9_000, "9000 x 9000 pixels")):
        url = "data:image/png;base64," + base64.b64encode(serve_load.bomb(side)).decode()
        with pytest.raises(Refused, match=said) as refused:
            images.Images(Limits()).fetched(url)
        assert refused.value.status == 413 and len(url) < 200_000


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOVLE_API_KEY", "of the environment")
    (tmp_path / "key").write_text("of the file\n")
    (tmp_path / "empty").write_text("\n")
    assert key_of("", "") == "of the environment" and key_of("", str(tmp_path / "key")) == "of the file"
    assert not capsys.readouterr().err
    assert key_of("given", "") == "given" and "seen by all users" in capsys.readouterr().err
    for given, file, said in (("a", "b", "both given"), ("", "empty", "is empty"), ("", "absent", "cannot be read")):
        with pytest.raises(UserError, match=said):
            key_of(given, str(tmp_path / file))


def test_a_port_that_is_taken_is_said():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port} .*: give another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="port 99999"):
        listen("127.0.0.1", 99999)


def test_more_than_may_wait_are_sent_away_and_a_slow_one_ends():
    limits = dataclasses.replace(LIMITS, queue=1, seconds=0.0)
    with serving(limits) as strict:
        slow = strict.post(URL, json=body())
        assert slow.status_code == 504 and "no answer within 0 seconds" in slow.json()["error"]["message"]
        crowded = strict.post(URL, json=body(n=2))
        assert crowded.status_code == 429
        deadline = time.monotonic() + 20
        while strict.worker.engine.num_free < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert strict.worker.engine.num_free == 2


def test_a_client_that_goes_away_frees_its_slot(client):
    prompt = Prompt.of("hello")
    ended = threading.Event()
    job = Job(client.worker.engine.prepare(prompt, Request(40)), lambda result: ended.set())
    client.worker.submit(job)
    client.worker.cancel(job)
    assert ended.wait(30) and job.stream.finish == "cancelled" and len(job.stream.tokens) < 40


def test_private_addresses_are_not_fetched(monkeypatch):
    limits = dataclasses.replace(LIMITS, hosts=("inside.example",))
    for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1"):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
        with pytest.raises(Refused, match="inside.example is a private address"):
            images.Images(limits).fetched("http://inside.example/a.png")
