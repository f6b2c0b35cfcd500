"""GGUF files in: their tensors, their order of rotary pairs, and their scaled positions."""

import dataclasses

import numpy as np
import pytest

from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.model.config import RopeScaling
from hovle_jax.model.rotary import frequencies
from tests.gguf_files import write_gguf
from tests.public_models import LLAMA3, llm, random_params
from tests.trees import host


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_gguf(arch, tmp_path):
    options = {"llama": {}, "qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm=True)}[arch]
    config = llm(arch, tied=arch == "qwen3", **options)
    params = random_params(ModelConfig(llm=config), "llm")
    add = lambda writer: writer.add_vocab_size(config.vocab_size)
    tensors = write_gguf(tmp_path / "model.gguf", config, params, add, quantized=["blk.1.ffn_up.weight"])

    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config == config
    found, expected = host(checkpoint.load()), host(params)
    for key, leaf in expected.items():
        tolerance = 0.02 if key == "stack/layers/up/kernel" else 0
        np.testing.assert_allclose(found[key], leaf, atol=tolerance, rtol=0, err_msg=key)
    if arch == "llama":  # neighbouring pairs: the file's rows are not ours
        assert not np.array_equal(tensors["blk.0.attn_q.weight"], expected["stack/layers/query/kernel"][0].T)
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete GGUF file"):
        open_checkpoint(tmp_path / "model.gguf").load()


GGUF_YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 30.0}
SCALINGS = {
    "linear": (RopeScaling("linear", 2.0, 64), {"type": "linear", "factor": 2.0}),
    "yarn": (RopeScaling("yarn", 4.0, 16, beta_fast=30.0), GGUF_YARN),
    "llama3": (LLAMA3, {}),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_positions_in_a_gguf(kind, tmp_path):
    scaling, keys = SCALINGS[kind]
    config = llm("llama", head_dim=32, num_heads=1, num_kv_heads=1, rope_scaling=scaling)

    def add(writer):
        for key, value in keys.items():
            name = f"llama.rope.scaling.{key}"
            {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](name, value)
        writer.add_vocab_size(config.vocab_size)
        if kind == "llama3":
            plain, _ = frequencies(dataclasses.replace(config.stack, rope_scaling=None))
            writer.add_tensor("rope_freqs.weight", (plain / frequencies(config.stack)[0]).astype(np.float32))

    write_gguf(tmp_path / "model.gguf", config, random_params(ModelConfig(llm=config), "llm"), add)
    found = open_checkpoint(tmp_path / "model.gguf")
    assert found.config.stack.rope_scaling == scaling
    found.load()


def test_rotary_factors_that_are_not_llama3s(tmp_path):
    """They stay what they are, and are LongRoPE's in public."""
    factors = (1.0, 2.0, 3.5, 8.0)
    scaling = RopeScaling("factors", 1.0, 64, attention_factor=1.0, factors=factors)
    config = llm("llama", rope_scaling=scaling)

    def add(writer):
        writer.add_vocab_size(config.vocab_size)
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    write_gguf(tmp_path / "model.gguf", config, random_params(ModelConfig(llm=config), "llm"), add)
    assert open_checkpoint(tmp_path / "model.gguf").config.stack.rope_scaling == scaling
    plain, _ = frequencies(dataclasses.replace(config.stack, rope_scaling=None))
    np.testing.assert_allclose(frequencies(config.stack)[0] * factors, plain, rtol=1e-6)
