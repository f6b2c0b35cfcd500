"""The page of the server: its endpoint for attention, its headers, and itself in a headless Chromium."""

import base64
import contextlib
import io
import re
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hovle_jax.inference.attention_maps import attention_maps
from hovle_jax.inference.generate import Prompt
from hovle_jax.serving import attention, page
from hovle_jax.serving.app import Server
from hovle_jax.serving.limits import Limits
from hovle_jax.serving.metrics import Metrics
from hovle_jax.serving.worker import Worker
from tests import micro
from tests.test_decode import make_answerer
from tests.test_serving import LIMITS, data_url, engine, said, serving

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE = micro.examples()[3].image
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def client():
    with serving() as made:
        yield made


def looked(answer="a blue one", **more):
    messages = [*said("what?", data_url(IMAGE)), {"role": "assistant", "content": answer}]
    return {"model": "tiny", "messages": messages, **more}


# ---------------------------------------------------------------------------------------------------------------------
# The endpoint


def test_the_endpoint_gives_the_maps_of_the_answer(client):
    reply = client.post(attention.PATH, json=looked())
    assert reply.status_code == 200, reply.text
    sent, maps = reply.json(), attention_maps(make_answerer(), Prompt.of("what?", IMAGE), "a blue one")
    assert "".join(sent["tokens"]) == "a blue one" and sent["grid"] == 2 and sent["num_layers"] == 2
    assert [layer["layer"] for layer in sent["layers"]] == [1, 2]
    for layer, wanted, share, sparsity in zip(sent["layers"], maps.of_answer, maps.image_share, maps.sparsity):
        each = wanted.reshape(len(sent["tokens"]), 1, 4)
        np.testing.assert_allclose(layer["tokens"], each, atol=2e-6)
        np.testing.assert_allclose(layer["answer"], each.mean(0), atol=2e-6)
        assert layer["image_share"] == pytest.approx(share, abs=2e-6)
        assert layer["sparsity"] == pytest.approx(sparsity, abs=2e-6)
    (tile,) = sent["tiles"]
    assert sent["images"] == [{"tiles": 1, "columns": 1, "thumbnail": False}]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(tile.partition(",")[2]))))
    np.testing.assert_array_equal(pixels, IMAGE)


def test_layers_are_the_requests_and_long_answers_are_cut(client):
    sent = client.post(attention.PATH, json=looked("y" * 40, layers=[2])).json()
    (layer,) = sent["layers"]
    assert layer["layer"] == 2 and len(layer["tokens"]) == len(sent["tokens"]) == attention.MOST_TOKENS


def test_maps_are_made_in_the_engines_thread(client, monkeypatch):
    seen = []

    def watch(*arguments):
        seen.append(threading.current_thread())
        raise RuntimeError("of the devices")

    monkeypatch.setattr(attention, "watch", watch)
    reply = client.post(attention.PATH, json=looked())
    assert reply.status_code == 500 and seen == [client.worker._thread]
    # It ended nothing else.
    assert client.post("/v1/chat/completions", json={"messages": said("hello"), "max_tokens": 2}).status_code == 200
    assert client.worker.metrics.errors == 0


BROKEN = {
    "a list": ([], 400, "the last one must be the assistant's"),
    "no answer": ({"messages": said("?", data_url(IMAGE))}, 400, "the last one must be the assistant's"),
    "an empty answer": (looked(" "), 400, "the answer is empty"),
    "no image": ({"messages": [*said("?"), {"role": "assistant", "content": "a"}]}, 400, "give at least one image"),
    "no such layer": (looked(layers=[3]), 400, "there is no layer 3: the LLM has layers 1 to 2"),
    "no layers": (looked(layers="all"), 400, "layers='all'"),
    "too long": (looked("word " * 40), 400, "the engine was made for 200"),
    "an unknown field": (looked(frobnicate=1), 400, "frobnicate is not supported"),
    "a large body": (looked("x" * 300_000), 413, "more than 200,000 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_looked_at_is_said(client, name):
    sent, status, message = BROKEN[name]
    reply = client.post(attention.PATH, json=sent)
    assert reply.status_code == status and message in reply.json()["error"]["message"], reply.text


def test_the_endpoint_is_limited_and_closed_like_the_others():
    with serving(key="secret") as closed:
        assert closed.post(attention.PATH, json=looked()).status_code == 401
        assert all(closed.get(path).status_code == 200 for path in page.PATHS)
    with serving(Limits(queue=0)) as crowded:
        assert crowded.post(attention.PATH, json=looked()).status_code == 429


# ---------------------------------------------------------------------------------------------------------------------
# The page's files


def test_the_page_loads_nothing_from_elsewhere(client):
    for path, (_, kind) in page.FILES.items():
        reply = client.get(path)
        assert reply.headers["content-type"].startswith(kind)
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        without = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|innerHTML|\son[a-z]+=\"|style=", without), path


def test_a_name_is_text_on_the_page():
    from starlette.testclient import TestClient

    worker = Worker(engine(), LIMITS, Metrics())
    with TestClient(Server(worker, '<b>"x"&', str, LIMITS).app()) as client:
        text = client.get("/").text
    assert worker.stop(30)
    assert "<b>" not in text and "<title>&lt;b&gt;&quot;x&quot;&amp;</title>" in text


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e .[browser]")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as made:
        launched = made.chromium.launch(executable_path=path, args=flags)
        yield launched
        launched.close()


@contextlib.contextmanager
def listening(app):
    """The address of a server in a thread."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        web = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=web.run, args=([free],), daemon=True)
        thread.start()
        while not web.started and thread.is_alive():
            time.sleep(0.01)
        yield "http://127.0.0.1:{}".format(free.getsockname()[1])
        web.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address():
    limits = Limits()  # its answers are longer than this engine's length
    worker = Worker(engine(), limits, Metrics())
    with listening(Server(worker, "tiny", str, limits, "secret").app()) as made:
        yield made
    assert worker.stop(30)


# What the answer is, each time that it changes.
TEXTS = """() => {
  window.texts = [];
  const take = () => texts.push([...document.querySelectorAll("article.assistant .said")].at(-1)?.textContent ?? "…");
  const whatever = {childList: true, subtree: true, characterData: true};
  new MutationObserver(take).observe(document.getElementById("talk"), whatever);
}"""
SIZES = {"desktop, light": ((1280, 800), "light", False), "phone, dark": ((390, 844), "dark", True)}


@pytest.mark.parametrize("name", SIZES)
def test_an_image_goes_in_and_an_answer_and_its_attention_come_out(name, browser, address, tmp_path):
    size, scheme, is_phone = SIZES[name]
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    context = browser.new_context(
        viewport=dict(zip(("width", "height"), size)), color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone
    )
    shown, wrong, asked = context.new_page(), [], []
    shown.set_default_timeout(60_000)
    shown.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(address)
    shown.locator("#files").set_input_files(tmp_path / "image.png")
    shown.get_by_role("button", name="Remove image 1").wait_for()
    shown.get_by_label("Message").fill("what is it?")
    shown.keyboard.press("Enter")

    # The key is asked for, and nothing that was typed is lost.
    shown.get_by_label("API key").fill("secret")
    assert wrong and all("401" in text for text in wrong)
    wrong.clear()
    assert shown.get_by_label("Message").input_value() == "what is it?"
    shown.evaluate(TEXTS)
    shown.keyboard.press("Enter")

    shown.locator(".speed").wait_for()
    assert shown.locator(".error").count() == 0
    texts = [text for text in shown.evaluate("window.texts") if text != "…"]
    assert len(set(texts)) >= 3 and all(later.startswith(text) for text, later in zip(texts, texts[1:]))  # streamed
    assert re.fullmatch(
        r"first text after [\d.]+ s · 50 tokens in [\d.]+ s · [\d.]+ tokens/s", shown.locator(".speed").text_content()
    )
    shown.locator("summary").focus()
    shown.keyboard.press("Enter")
    canvas = shown.get_by_role("img", name=re.compile("^Tile 1 of 1: "))
    canvas.wait_for()
    first = canvas.get_attribute("aria-label")
    shown.get_by_label("1 of 2", exact=True).focus()
    shown.keyboard.press("ArrowRight")  # the next layer
    assert shown.get_by_label("2 of 2", exact=True).is_checked() and canvas.get_attribute("aria-label") != first
    pixels = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    drawn = np.reshape(canvas.evaluate(pixels), (448, 448, 4))[..., :3]
    cells = drawn.reshape(2, 224, 2, 224, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1).max(1)
    assert cells.max() == 255 and cells.min() < 255  # where it looked most in the tile's own white, elsewhere darker

    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wrong == [] and all(url.startswith((address, "data:")) for url in asked)
    context.close()
