"""Requests that begin and do not go on."""

import socket
import threading
import time

import pytest

from hovle_jax.serving.heads import in_time

uvicorn = pytest.importorskip("uvicorn")

HEAD = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n\r\n"


async def echo(scope, receive, send):
    """An application that answers with the body."""
    body = b""
    while (event := await receive())["type"] == "http.request":
        body += event["body"]
        if not event["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port():
    web = uvicorn.Server(uvicorn.Config(echo, http=in_time(0.5), log_level="warning", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    web.should_exit = True
    thread.join(30)


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def rest(line):
    """All that comes until the other end closes."""
    return b"".join(iter(lambda: line.recv(2**16), b""))


@pytest.mark.parametrize("begin", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: here\r\n"])
def test_half_a_head_is_closed(port, begin):
    with connected(port) as line:
        line.sendall(begin)
        assert rest(line).startswith(b"HTTP/1.1 408 ")


def test_a_head_in_drops_and_one_after_a_whole_request(port):
    with connected(port) as drops, connected(port) as later:
        later.sendall(HEAD + b"ab")
        assert later.recv(2**16).startswith(b"HTTP/1.1 200 ")
        later.sendall(HEAD[:9])
        for _ in range(8):
            drops.settimeout(30)
            drops.sendall(b"G")
            time.sleep(0.1)
            if _is_closed(drops):
                break
        else:
            pytest.fail("still open")
        assert b"HTTP/1.1 408 " in rest(later)


def _is_closed(line):
    line.settimeout(0.01)
    try:
        return line.recv(12, socket.MSG_PEEK).startswith(b"HTTP/1.1 408")
    except TimeoutError:
        return False


def test_a_slow_body_is_not_the_heads_affair(port):
    with connected(port) as line:
        line.sendall(HEAD)
        time.sleep(0.8)
        line.sendall(b"ab")
        assert line.recv(2**16).endswith(b"\r\n\r\nab")
