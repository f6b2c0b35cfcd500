"""The Python API and the commands that answer, over a model with random weights."""

import functools
import json
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

import hovle_jax
from hovle_jax.checkpoints import save_model
from hovle_jax.conversion.exporting import export_model
from hovle_jax.errors import UserError
from hovle_jax.inference.answering import request_of
from hovle_jax.inference.beam import Beam, answers
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.system.printable import printable
from tests import micro
from tests.test_commands import ROOT, command, environment

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with an image beside it."""
    made = tmp_path_factory.mktemp("answering")
    config = micro.run_config("instruct")
    params = micro.params(config)
    save_model(made / "run", config.model_config.only(("embedding", "llm")), {c: lambda c=c: params[c] for c in params})
    micro.tokenizer().save(made / "run")
    Image.fromarray(micro.examples()[0].image).save(made / "a.png")
    return made


@pytest.fixture(scope="module")
def model(folder):
    return hovle_jax.load(str(folder / "run"), slots=2, length=256)


def plain(folder, *prompts):
    """The answers of the batched greedy program."""
    known = _known(folder)
    return [known[text] for text, *_ in prompts]


@functools.cache
def _known(folder):
    """{prompt: its answer} of all that is asked below, in one batch."""
    image = Image.open(folder / "a.png").convert("RGB")
    asked = {"what is it?": [image], "and that?": [image], "hello": [], "why?": []}
    prompts = [Prompt.of(text, *images) for text, images in asked.items()]
    return dict(zip(asked, answer(load_run(folder / "run").answerer, prompts, 6)))


def test_the_api_answers_streams_and_talks(folder, model):
    picture = folder / "a.png"
    image = Image.open(picture).convert("RGB")
    wanted = plain(folder, ("what is it?", image), ("and that?", image), ("hello",))
    assert model.answer(["what is it?", "and that?"], images=[picture], max_new_tokens=6) == wanted[:2]
    assert model.answer("hello", max_new_tokens=6) == wanted[2]
    assert "".join(model.stream("what is it?", images=str(picture), max_new_tokens=6)) == wanted[0]
    chat = model.chat(max_new_tokens=6)
    said = chat.say("what is it?", images=image), chat.say("and now?", images=[image])
    assert said[0] == wanted[0] and len(chat.turns) == 2 and len(chat.images) == 2
    turns = (("<image>\nwhat is it?", said[0]), ("<image>\nand now?", None))
    (again,) = answer(load_run(folder / "run").answerer, [Prompt(turns, (image, image))], 6)
    assert said[1] == again


def test_a_stream_that_is_left_gives_its_slot_back(model):
    stream = model.stream("hello", max_new_tokens=60)
    next(stream)
    assert model.engine.num_free == 1
    stream.close()
    assert model.engine.num_free == 2


def test_options_that_are_none_are_refused():
    with pytest.raises(TypeError, match="unknown options heat; known are min_p"):
        request_of(heat=1.0)
    with pytest.raises(UserError, match="temperature=-1"):
        request_of(temperature=-1)


def test_questions_from_a_file(folder):
    rows = [
        {"prompt": "what is it?", "image": "a.png", "id": 7},
        {"question": "hello"},
        {"prompt": "why?", "images": []},
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["--checkpoint", folder / "run", "--input", folder / "in.jsonl", "--output", folder / "out.jsonl"]
    done = command("generate", *asked, "--max_new_tokens=6")
    assert done.returncode == 0, done.stderr
    whole = (folder / "out.jsonl").read_text()
    found = [json.loads(line) for line in whole.splitlines()]
    image = Image.open(folder / "a.png").convert("RGB")
    answers = plain(folder, ("what is it?", image), ("hello",), ("why?",))
    assert found == [row | {"answer": said} for row, said in zip(rows, answers)]
    # A line that was being written when the run was killed is made again.
    (folder / "out.jsonl").write_text(whole[: len(whole) * 2 // 3])
    again = command("generate", *asked, "--max_new_tokens=6")
    assert "going on from there" in again.stderr and (folder / "out.jsonl").read_text() == whole


@pytest.mark.slow
def test_a_beam_search_by_command(folder):
    (folder / "searched.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "what?"}\n')
    files = ["--input", folder / "searched.jsonl", "--output", folder / "found.jsonl"]
    done = command("generate", "--checkpoint", folder / "run", *files, "--beams=3", "--max_new_tokens=6")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["answer"] for line in (folder / "found.jsonl").read_text().splitlines()]
    asked = [Prompt.of("hello"), Prompt.of("what?")]
    assert found == list(answers(load_run(folder / "run").answerer, asked, Beam(3), 6))


def test_a_public_folder_answers_as_the_run_that_was_exported(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOVLE_CACHE", str(folder / "cache"))
    export_model(folder / "run", folder / "public", say=lambda _: None)
    model = hovle_jax.load(folder / "public", slots=2, length=256)
    assert [model.answer("hello", max_new_tokens=6)] == plain(folder, ("hello",))
    assert "public is a public checkpoint: importing it once into" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, said",
    [
        ("{", "in.jsonl:2: no JSON"),
        ('{"text": "hi"}', 'in.jsonl:2: no text under "prompt" or "question"'),
        ('{"prompt": "hi", "image": "b.png"}', "there is no image"),
        ('{"prompt": "hi", "images": "a.png", "image": 1}', ""),
    ],
)
def test_a_row_that_asks_nothing_is_named(tmp_path, row, said):
    from hovle_jax.inference.many import read_questions

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n' + row)
    if not said:
        assert read_questions(tmp_path / "in.jsonl")[1].images == (tmp_path / "a.png",)
        return
    with pytest.raises(UserError, match=said):
        read_questions(tmp_path / "in.jsonl")


def test_answers_to_other_questions_are_not_gone_on_with(tmp_path):
    from hovle_jax.inference.many import read_questions, rows_done

    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "ho"}\n')
    questions, out = read_questions(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    out.write_text('{"prompt": "hi", "answer": "x"}\n')
    assert rows_done(out, questions) == 1
    out.write_text('{"prompt": "ho", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"out.jsonl:1 answers another question"):
        rows_done(out, questions)


def test_a_chat_in_the_terminal(folder):
    said = f"/image {folder}/absent.png\n/image {folder}/a.png\nwhat is it?\n/new\nhello\n/quit\n"
    done = command("chat", "--checkpoint", folder / "run", "--max_new_tokens=6", said=said)
    assert done.returncode == 0, done.stderr
    image = Image.open(folder / "a.png").convert("RGB")
    said = [printable(text, lines=True) for text in plain(folder, ("what is it?", image), ("hello",))]
    assert done.stdout.split("\n") == [*said, ""]  # an untrained model says control characters
    assert "error: no image at" in done.stderr


def test_a_server_answers_and_ends_in_good_order(folder):
    pytest.importorskip("uvicorn")
    (folder / "key").write_text("secret\n")
    flags = ["--port=0", "--length=256", "--warm_up=1", f"--api_key_file={folder}/key"]
    line = [sys.executable, "-m", "hovle_jax.serve", "--checkpoint", folder / "run", *flags]
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as server:
        try:
            said = []
            while "serving run at http://127.0.0.1:" not in "".join(said[-1:]):
                said.append(server.stderr.readline())
                assert said[-1], said
            port = int(said[-1].split(":")[2].split()[0])  # the real one
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
            url, key = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": "Bearer secret"}
            sent = urllib.request.Request(url, json.dumps(body).encode(), key)
            with urllib.request.urlopen(sent, timeout=120) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
            assert [text] == plain(folder, ("hello",))
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            said = "".join(said) + server.stderr.read()
            assert "GB of weights; 8 answers at once of 256 tokens" in said
            assert "programs compiled, for requests of up to 1 token" in said and "Traceback" not in said
        finally:
            server.kill()


def _wait_for(url, server):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
