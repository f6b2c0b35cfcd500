"""GGUF files: logits, greedy tokens, and tensors, dequantised and under their public names."""

import pathlib

import jax
import numpy as np

from hovle_jax.conversion.verify.llm import EXECUTION, greedy_text, text_inputs
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.errors import UserError
from hovle_jax.formats import llama
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.hovle import LanguageModel

ALIASES = {"layer0.q_proj": "model.layers.0.self_attn.q_proj.weight"}


def verify_gguf(file: pathlib.Path, reference: Reference) -> None:
    """Compares the arrays whose names start with TAG, of the file's name model-TAG.gguf."""
    checkpoint, tag = open_checkpoint(file), file.stem.removeprefix("model-") + "."
    config, params = checkpoint.config, checkpoint.load()
    model = LanguageModel(config, EXECUTION)
    tokens, positions, segment_ids = text_inputs(reference, config.vocab_size)
    logits = jax.jit(model.apply)({"params": params}, tokens, positions, segment_ids)
    reference.compare(tag + "logits", logits, segment_ids > 0)
    _verify_tensors(checkpoint, reference, tag, to_public(llama.rules(config), params))
    if tag + "greedy_sequence" in reference:
        # The prompt is what the sequence and the first input row share at their start.
        found = reference.input(tag + "greedy_sequence", kind=np.integer)
        expected = found.reshape(1, -1)
        length = min(expected.shape[1], tokens.shape[1])
        prompt = int(np.argmin(np.append(expected[0, :length] == tokens[0, :length], False)))
        if not 0 < prompt < expected.shape[1]:
            raise UserError(f"expected.npz: {tag}greedy_sequence does not continue the first row of input_ids")
        ours, _ = greedy_text(model, params, expected[:, :prompt], np.ones((1, prompt), np.int32), expected)
        reference.compare_tokens(tag + "greedy_sequence", ours.reshape(found.shape))


def _verify_tensors(checkpoint, reference, tag, public):
    """`TAG.gguf.NAME` is a tensor of the file, dequantised; `TAG.hf.NAME` the public tensor that it becomes."""
    for name in list(reference.arrays):
        kind, _, key = name.removeprefix(tag).partition(".")
        if not name.startswith(tag) or kind not in ("gguf", "hf"):
            continue
        if kind == "gguf":
            key = key if key.endswith((".weight", ".bias")) else key + ".weight"
        else:
            key = ALIASES.get(key, key)
        if key not in (checkpoint.source.shapes if kind == "gguf" else public):
            raise UserError(f"expected.npz: {name}: the file has no tensor {key}")
        reference.compare(name, checkpoint.source.read(key) if kind == "gguf" else public[key])
