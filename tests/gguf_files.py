"""GGUF files of small LLMs, as llama.cpp's converter writes them."""

import numpy as np
import pytest

from hovle_jax.formats import gguf as ours
from hovle_jax.formats.mapping import to_public


def write_gguf(path, config, params, add=lambda writer: None, quantized=()):
    """Writes an LLM (norm_eps 1e-5, rope_theta 1e4); skips the test without the package gguf.

    Args:
      add: puts further metadata into the package's writer.
      quantized: names of tensors that are written as Q8_0 blocks.
    Returns:
      {name: float32 array} of what was written, before it was quantised.
    """
    gguf = pytest.importorskip("gguf")
    stack, writer = config.stack, gguf.GGUFWriter(path, config.family)
    writer.add_block_count(stack.num_layers)
    writer.add_embedding_length(stack.width)
    writer.add_feed_forward_length(stack.mlp_width)
    writer.add_head_count(stack.num_heads)
    writer.add_head_count_kv(stack.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_context_length(config.max_length)
    add(writer)
    tensors = {name: np.ascontiguousarray(x) for name, x in to_public(ours.rules(config), params).items()}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        if name in quantized:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
