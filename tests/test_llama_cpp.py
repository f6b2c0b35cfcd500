"""The same model in other hands: our own GGUF reader gives it back, and llama.cpp the same greedy tokens."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hovle_jax.checkpoints import load_component, load_model_config
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.gguf_file import export_as_gguf
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.llama_folder import export_as_llama
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.formats import one_llama
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.inference.generate import Prompt, answer, greedy
from hovle_jax.inference.load import load_run
from hovle_jax.model.config import RopeScaling
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD
from tests import bpe, by_llama_cpp, micro, shared, test_one_llama
from tests.one_llama import documented, hovle, made, quiet
from tests.public_models import FACTORS, LLAMA3, YARN, llm
from tests.test_llama_folder import prefixing
from tests.test_one_llama import TOLERANCE, batch_of
from tests.trees import host

pytestmark = pytest.mark.usefixtures("quick_compilation")
pytest.importorskip("gguf")
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
LLMS = {
    "internlm2": llm("internlm2", rope_scaling=RopeScaling("linear", 2.0, 64)),
    "llama, biases, tied, llama3": llm("llama", tied=True, rope_scaling=LLAMA3, **BIASES),
    "llama, yarn, wide heads": llm("llama", rope_scaling=YARN, num_kv_heads=1, head_dim=12),
    "llama, yarn, the paper's factor": llm("llama", rope_scaling=dataclasses.replace(YARN, attention_factor=0.0)),
    "llama, factors": llm("llama", rope_scaling=dataclasses.replace(FACTORS, original_length=64)),
    "qwen2": llm("qwen2", qkv_bias=True, num_kv_heads=1),
    "qwen3": llm("qwen3", qk_norm=True, head_dim=16, tied=True),
}
HOVLES = {name: test_one_llama.MODELS[name] for name in ("wide heads, biases", "larger tiles, yarn", "dynamic")}
HOVLES["unequal layers, tied, padded"] = hovle(layers=(3, 1), llm=dict(tied=True), vocab_multiple=128)
MODELS = {name: ModelConfig(llm=config) for name, config in LLMS.items()} | HOVLES


def forward(config, params, length=40):
    """A function of ids, `length` at most, that gives [L, V] of the model itself, without the vocabulary's padding."""

    @jax.jit
    def run(batch):
        if config.embedding is None:
            llm = LanguageModel(config.llm, Execution()).bind({"params": params["llm"]})
            x = llm.token_embedding(batch["tokens"])
            return llm.logits(llm.run(x, batch["positions"], batch["segment_ids"])[0])[0]
        return HoVLE(config.model).logits(params, batch)[0]

    def logits(ids):
        padded = np.pad(ids, (0, length - len(ids)))  # what comes later changes nothing
        return np.asarray(run(batch_of(padded)))[: len(ids), : config.llm.vocab_size]

    return logits


def check_greedy(answer, prompt, logits, banned=()):
    """Each token is the most likely one after all before it, by a forward of the whole text; its probability is ours.

    Args:
      answer: (tokens read, ids, log-probabilities).
      logits: function of ids -> [L, V].
      banned: ids that were not allowed.
    """
    read, tokens, logprobs = answer
    assert read == len(prompt)
    assert tokens
    found = logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    ours = np.asarray(jax.nn.log_softmax(found))[range(len(tokens)), tokens]
    np.testing.assert_allclose(logprobs, ours, atol=TOLERANCE)
    found = found.copy()
    found[:, list(banned)] = -np.inf
    assert tokens == found.argmax(-1).tolist()


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """-> (config, parameters, the file's path)."""
    config, folder = MODELS[request.param], tmp_path_factory.mktemp("exported")
    params = made(folder / "ours", config)
    export_as_gguf(folder / "ours", folder / "model.gguf", say=quiet)
    return config, params, folder / "model.gguf"


def test_our_own_reader_gives_the_same_model(exported):
    config, params, path = exported
    checkpoint = open_checkpoint(path)
    found, merged = checkpoint.config, checkpoint.load()
    if config.embedding is None:
        check_config(found, dataclasses.replace(config.llm, family=config.llm.family.replace("internlm2", "llama")))
        back, expected = host(merged), host(params["llm"])
        for key, leaf in expected.items():
            np.testing.assert_array_equal(back[key], leaf, err_msg=key)
        return
    check_config(found, one_llama.llm_config(config.model))
    ids = np.random.default_rng(0).integers(8, config.llm.vocab_size, 40)
    merged = forward(ModelConfig(llm=found), {"llm": merged})(ids)
    np.testing.assert_allclose(merged, forward(config, params)(ids), atol=TOLERANCE)


def check_config(found, expected):
    """Equal, but for YaRN's factor of cos and sin, which goes through a quotient of float32."""
    scaling, wanted = found.stack.rope_scaling, expected.stack.rope_scaling
    if wanted is not None and wanted.kind == "dynamic":
        wanted = None
    if wanted is not None and wanted.kind == "yarn":
        assert scaling.attention_factor == pytest.approx(wanted.attention_factor, abs=1e-6)
        wanted = dataclasses.replace(wanted, attention_factor=scaling.attention_factor)
    assert scaling == wanted
    unscaled = lambda config: dataclasses.replace(config, stack=dataclasses.replace(config.stack, rope_scaling=None))
    assert unscaled(found) == unscaled(expected)


def test_llama_cpp_gives_the_same_tokens(exported):
    config, params, path = exported
    rng, logits = np.random.default_rng(1), forward(config, params)
    prompts = [rng.integers(8, config.llm.vocab_size, length).tolist() for length in (3, 24)]
    for prompt, given in zip(prompts, by_llama_cpp.greedy(path, prompts, 12), strict=True):
        check_greedy(given, prompt, logits)


@pytest.mark.parametrize("name", ["hovle-tiny", "hovle-tiny-stride28"])
def test_llama_cpp_gives_the_tokens_of_a_reference_model(name, tmp_path):
    """As our decoding with caches does."""
    import_checkpoint(shared.golden(name), tmp_path / "ours", say=quiet)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    config = load_model_config(tmp_path / "ours")
    params = {c: load_component(tmp_path / "ours", c, shapes(config, c)) for c in ("embedding", "llm")}
    prompt = np.random.default_rng(0).integers(3, 140, 30).tolist()
    (given,) = by_llama_cpp.greedy(tmp_path / "model.gguf", [prompt], 32)
    check_greedy(given, prompt, forward(config, params, 62))
    ours = greedy(params, batch_of(prompt), hovle=HoVLE(config.model), max_new_tokens=32, stop_ids=())
    assert given[1] == ours[0].tolist()


def test_llama_cpp_takes_images_as_vectors(tmp_path):
    """Made with the documented code from vision.safetensors: the logits of the public PyTorch code."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    torch, expected = pytest.importorskip("torch"), np.load(shared.golden("hovle-tiny") / "expected.npz")
    import_checkpoint(shared.golden("hovle-tiny"), tmp_path / "ours", say=quiet)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    export_as_llama(tmp_path / "ours", tmp_path / "llama", say=quiet)
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1) * np.float32(IMAGENET_STD) + np.float32(IMAGENET_MEAN)
    table = torch.from_numpy(load_file(tmp_path / "llama" / "model.safetensors")["model.embed_tokens.weight"])
    given = torch.from_numpy(expected["input_ids"][0]), torch.from_numpy(pixels * 255)
    x = documented(0)["embed_prompt"](tmp_path / "llama", torch.nn.Embedding.from_pretrained(table), *given)
    found = by_llama_cpp.logits_of_vectors(tmp_path / "model.gguf", x.numpy())
    np.testing.assert_allclose(found, expected["logits"][0], atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = ["what color is the shape?", "  two  blanks\n\nand é 東 🙂\ttab", "It's 2026: 12345 isn't\n"]


TOKENIZERS = {
    "trained": micro.tokenizer,
    "sentencepiece": lambda: prefixing(remove_extra_whitespaces=False),
    "bpe": bpe.tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_reads_texts_and_chats_as_we_do(kind, tmp_path):
    """The same number of ids, and the same probabilities after them."""
    tokenizer = TOKENIZERS[kind]()
    config = hovle(vocab_size=tokenizer.vocab_size + 3)
    config = dataclasses.replace(config, system_message='be "brief"\n.')
    params = made(tmp_path / "ours", config, tokenizer)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = [[*begin, *tokenizer.encode(text)] for text in TEXTS]
    turns = [("a", "b"), (TEXTS[0], None)]
    prompts += [encode_conversation(tokenizer, turns, config.system_message).tokens.tolist()]
    roles = [("user", "a"), ("assistant", "b"), ("user", TEXTS[0])]
    asked = [*TEXTS, [{"role": role, "content": text} for role, text in roles]]
    # llama.cpp waits for whole characters before it gives tokens.
    whole = lambda text: bool(text) and text.isascii()
    banned = [i for i in range(config.llm.vocab_size) if not whole(tokenizer.decode([i]))]
    logits = forward(config, params, 160)
    answers = by_llama_cpp.greedy(tmp_path / "model.gguf", asked, 3, banned)
    for prompt, given in zip(prompts, answers, strict=True):
        check_greedy(given, prompt, logits, banned)


def test_the_documented_example(tmp_path):
    """The Python block of the page, as it stands, answers a chat as we do."""
    by_llama_cpp.skip_without()
    tokenizer = bpe.tokenizer()
    tokenizer.chat_template = bpe.CHATML
    config = dataclasses.replace(llm("llama"), vocab_size=tokenizer.vocab_size)
    made(tmp_path / "ours", ModelConfig(llm=config), tokenizer)
    export_as_gguf(tmp_path / "ours", tmp_path / "model.gguf", say=quiet)
    page = (pathlib.Path(__file__).parents[1] / "docs" / "answering.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "xllamacpp" in text)
    line = [sys.executable, "-c", block]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = load_run(tmp_path / "ours")
    (ours,) = answer(loaded.answerer, [Prompt.of("What is the capital of France?")], max_new_tokens=20)
    assert len(ours) > 5 and result.stdout.strip() == ours
