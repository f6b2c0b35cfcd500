"""OpenAI's own Python client, as it is, against the server."""

import contextlib
import threading
import time

import pytest

from hovle_jax.serving.metrics import Metrics
from hovle_jax.serving.opening import listen
from tests import micro
from tests.test_serving import LIMITS, Server, Worker, data_url, engine

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: pip install openai")
uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@contextlib.contextmanager
def listening():
    """A server on a port of this machine; gives the address of its API."""
    worker = Worker(engine(), LIMITS, Metrics())
    app = Server(worker, "tiny", str, LIMITS, "secret").app()
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=web.run, kwargs={"sockets": [socket]})
        thread.start()
        while not web.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        finally:
            web.should_exit = True
            thread.join(30)
            assert worker.stop(30)


@pytest.fixture(scope="module")
def address():
    with listening() as made:
        yield made


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="secret", max_retries=0)


def asked(**more):
    image = {"url": data_url(micro.examples()[3].image), "detail": "low"}
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": image}]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, **more}


def test_an_answer_about_an_image_whole_and_in_pieces(client):
    whole = client.chat.completions.create(**asked(max_completion_tokens=12, n=2, logprobs=True, seed=1, user="me"))
    first, second = whole.choices
    assert first.message.content == second.message.content and first.finish_reason in ("length", "stop")
    assert len(first.logprobs.content) == 12 and whole.usage.completion_tokens == 24
    *chunks, counts = client.chat.completions.create(
        **asked(max_tokens=12, stream=True, logprobs=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == first.message.content
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == 12
    assert counts.usage.prompt_tokens == whole.usage.prompt_tokens and chunks[-1].choices[0].finish_reason
    more = {"top_k": 3, "repetition_penalty": 1.1, "max_dynamic_patch": 1}
    assert client.chat.completions.create(**asked(max_tokens=3, extra_body=more)).choices


def test_errors_are_the_clients_own(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    for more, kind, param in (
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"frobnicate": 1}}, openai.BadRequestError, "frobnicate"),
    ):
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**asked(**more))
        assert refused.value.param == param and param in str(refused.value)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()
