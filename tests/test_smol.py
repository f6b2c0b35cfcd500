"""SmolLM2-135M-Instruct against transformers (tests/reference/make_smol.py); needs the model in the cache folder."""

import json
import pathlib

import jax
import numpy as np
import pytest

from hovle_jax.checkpoints import is_finished
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.model.presets import smol_model
from hovle_jax.system.cache import cache_dir

CASES = json.loads((pathlib.Path(__file__).parent / "golden" / "smol-llm.json").read_text())


@pytest.fixture(scope="module")
def smol():
    folder = cache_dir("models") / "smol-llm"
    if not is_finished(folder):
        pytest.skip("fetch it once: python -m hovle_jax.generate --checkpoint smol-llm --prompt hello")
    return load_run(folder)


def test_the_preset_has_its_sizes(smol):
    assert smol.config.llm == smol_model().llm


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"])
def test_ids(smol, case):
    ours = encode_conversation(smol.tokenizer, [(case["prompt"], None)]).tokens.tolist()
    if "<|" in case["prompt"]:  # the reference lets a user's words become special tokens
        assert ours != case["ids"]
        assert smol.tokenizer.decode(ours, skip_special=False) == case["text"]
    else:
        assert ours == case["ids"]


def test_logits(smol):
    length = max(len(case["ids"]) for case in CASES)
    tokens = np.stack([np.pad(case["ids"], (0, length - len(case["ids"]))) for case in CASES]).astype(np.int32)
    index = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    ends = np.asarray([[len(case["ids"])] for case in CASES])
    llm = smol.models["llm"]
    logits = jax.jit(llm.apply)({"params": smol.params["llm"]}, tokens, index, (index < ends).astype(np.int32))
    for case, row, end in zip(CASES, np.asarray(logits), ends[:, 0], strict=True):
        last = row[end - 1]
        np.testing.assert_allclose(last[case["at"]], case["logits"], atol=1e-3, rtol=0)
        assert last.max() == pytest.approx(case["largest"], abs=1e-3)
        assert last.argmax() == case["best"]


def test_it_knows_paris(smol):
    assert "Paris" in answer(smol.answerer, [Prompt.of("What is the capital of France?")], max_new_tokens=12)[0]
