"""A server of its own under a short load of all kinds of requests; `tests/benchmarks/serve_load.py` is the long one."""

import pytest

from tests.benchmarks import serve_load
from tests.test_commands import environment

pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_answers_in_a_crowd_are_those_of_a_lone_run(tmp_path, monkeypatch):
    """Beside clients that go away, image bombs, and requests that are malformed or slow."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    checkpoint = serve_load.tiny_model(tmp_path / "tiny")
    served = serve_load.Served(checkpoint, "--slots=4", "--length=512", "--warm_up=0")
    try:
        served.wait()
        seen = serve_load.load(served, requests=60, clients=6, pause=0.05)
    finally:
        status = served.stop()
    assert not seen["wrong"] and not seen["stuck slots"] and not seen["sent away for the crowd"]
    assert all(seen["requests"].values()) and sum(seen["requests"].values()) == 60
    assert seen["seconds to the first text"]["p50"] > 0 and seen["growth"] > 0
    assert status == 0 and not any("Traceback" in line for line in served.said), served.said
