"""What is given instead of a finished model, and texts longer than it reads: a line each, before anything compiles."""

import dataclasses
import json

import numpy as np
import pytest

from hovle_jax.data.processor import Processor
from hovle_jax.errors import UserError
from hovle_jax.evaluation.benchmarks import evaluate
from hovle_jax.inference import generate
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.inference.limits import check_lengths
from hovle_jax.model.config import HoVLEConfig, RopeScaling
from hovle_jax.model.hovle import HoVLE
from tests import micro
from tests.public_models import llm
from tests.test_commands import command


def model(folder):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    return folder


def refused(folder, message):
    with pytest.raises(UserError, match=message):
        check_model_folder(folder)


def test_a_finished_model(tmp_path):
    check_model_folder(model(tmp_path / "run"))


def test_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remedy = r"python -m hovle_jax\.convert import hf:OpenGVLab/HoVLE models/HoVLE, then --checkpoint models/HoVLE$"
    refused("OpenGVLab/HoVLE", "no folder OpenGVLab/HoVLE; if it is a model of the hub, give hf:OpenGVLab/HoVLE$")
    refused("hf:OpenGVLab/HoVLE", "is a model of the hub, which is imported first: " + remedy)
    for name in ("runs/instruct", "/nowhere/at/all", "instruct"):
        refused(name, rf"there is no folder {name}; give that of a finished run, as runs/instruct, or of an import$")


def test_a_public_checkpoint(tmp_path):
    folder = tmp_path / "HoVLE"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (tmp_path / "tiny.gguf").touch()
    refused(folder, r"HoVLE is a public checkpoint, which is imported first: .* import .*/HoVLE models/HoVLE, then")
    refused(tmp_path / "tiny.gguf", r"convert import .*/tiny\.gguf models/tiny, then --checkpoint models/tiny")


def test_a_run_that_stopped_early(tmp_path):
    folder = tmp_path / "pretrain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(micro.run_config("pretrain", steps=400).to_dict()))
    refused(folder, r"pretrain holds no finished model: the run stopped before its first checkpoint \(of 400 steps\)")
    for step in (9, 60, 30):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    refused(folder, r"the run stopped at step 60 of 400; its training command, once more, goes on from there")


def test_a_folder_of_runs(tmp_path):
    refused(tmp_path, r"holds no finished model: give that of a finished run, as runs/instruct, or of an import")
    for stage in ("align", "instruct", "pretrain"):
        model(tmp_path / stage)
    refused(tmp_path, rf"as {tmp_path}/instruct, or of an import")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, rf"as {tmp_path}/instruct, or of an import")


def test_the_commands_say_it(tmp_path):
    result = command("generate", "--checkpoint", "some-where/else", "--prompt", "hi", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "there is no folder some-where/else; if it is a model of the hub, give hf:some-where/else" in result.stderr
    with pytest.raises(UserError, match="there is no folder"):
        evaluate(tmp_path / "absent", "easy_vqa")


def test_texts_longer_than_the_model():
    config = llm("internlm2")  # of 64 positions
    check_lengths(config, 60, 4)
    message = r"has 60 tokens and its answer may have 5: the model reads 64 in all; ask for at most 4 new tokens"
    with pytest.raises(UserError, match=message):
        check_lengths(config, 60, 5)
    with pytest.raises(UserError, match="64 in all; shorten the prompt, or give fewer images"):
        check_lengths(config, 64, 1)
    linear = dataclasses.replace(config.stack, rope_scaling=RopeScaling("linear", 2.0, 64))
    with pytest.raises(UserError, match="shorten the prompt"):
        check_lengths(dataclasses.replace(config, stack=linear), 70, 1)
    dynamic = dataclasses.replace(config.stack, rope_scaling=RopeScaling("dynamic", 2.0, 64))
    check_lengths(dataclasses.replace(config, stack=dynamic), 70, 1)


def test_nothing_is_compiled_for_a_text_that_is_too_long(monkeypatch):
    compiled = []
    monkeypatch.setattr(generate, "greedy", lambda *_, **k: compiled.append(k) or np.zeros((1, 40), np.int32))
    config = dataclasses.replace(llm("internlm2"), vocab_size=micro.VOCAB, max_length=40)
    answerer = generate.Answerer(HoVLE(HoVLEConfig(None, config)), {}, Processor(micro.tokenizer()))
    with pytest.raises(UserError, match="the model reads 40 in all"):
        generate.answer(answerer, [generate.Prompt.of("hello")], max_new_tokens=40)
    assert not compiled
