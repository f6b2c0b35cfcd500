"""An LLM alone: logits, features, loss, gradients and greedy tokens of text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Params
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.errors import UserError
from hovle_jax.formats.families import Checkpoint
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from hovle_jax.model.transformer import Stack

IGNORED = -100
EXECUTION = Execution()


def shifted_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean cross-entropy of logits [B, L, V] and labels [B, L] shifted by one, without `IGNORED` ones."""
    targets, scores = labels[:, 1:], jax.nn.log_softmax(logits[:, :-1])
    weights = targets != IGNORED
    chosen = jnp.take_along_axis(scores, jnp.where(weights, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights, chosen, 0)) / jnp.sum(weights)


def text_inputs(reference: Reference, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (tokens, positions, segment_ids), each [B, L] int32; padding is segment 0."""
    tokens = reference.ids("input_ids", vocab_size)
    mask = reference.mask("attention_mask", tokens) if "attention_mask" in reference else np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, mask


def embed(llm: LanguageModel, tokens: np.ndarray, public_config: dict[str, Any]) -> jax.Array:
    """Token vectors. No gradient reaches the padding id's row from here, as by torch's `padding_idx` in public code."""
    x = llm.token_embedding(tokens)
    padding = public_config.get("pad_token_id", 0 if llm.config.family == "internlm2" else None)
    return x if padding is None else jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)


def with_loss(
    forward: Callable[[Params], tuple[jax.Array, Any]],
    reference: Reference,
    params: Params,
    public: Callable[[Params], Mapping[str, Any]],
) -> tuple[jax.Array, Any]:
    """Runs forward(params) -> (logits [B, L, V], more); with labels, compares loss and gradients.

    Args:
      public: gradients of the parameters -> {public name: array}.
    """
    if "labels" not in reference:
        return jax.jit(forward)(params)
    labels = _labels(reference, jax.eval_shape(forward, params)[0].shape[-1])

    def loss(params):
        logits, more = forward(params)
        return shifted_loss(logits, labels), (logits, more)

    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    reference.compare("loss", value)
    reference.compare_gradients(public(gradients))
    return outputs


def _labels(reference, vocab_size):
    """[B, L] int32. Raises UserError where none counts, or an id is outside the vocabulary."""
    labels = reference.input("labels", reference.arrays["input_ids"].shape, np.integer)
    counted = labels[:, 1:][labels[:, 1:] != IGNORED]
    if not counted.size:
        raise UserError(f"expected.npz: labels are {IGNORED} everywhere after the first token: there is no loss")
    if not 0 <= counted.min() <= counted.max() < vocab_size:
        raise UserError(f"expected.npz: labels have ids {counted.min()} to {counted.max()}, and there are {vocab_size}")
    return labels.astype(np.int32)


def verify_llm(checkpoint: Checkpoint, reference: Reference) -> None:
    """Compares all that expected.npz has of an LLM."""
    config, params = checkpoint.config, checkpoint.load()
    model = LanguageModel(config, EXECUTION)
    if reference.has("input_ids"):
        _verify_text(checkpoint, reference, model, params)
    if reference.has("greedy_sequence", "greedy_prompt"):
        prompt = reference.ids("greedy_prompt", config.vocab_size)
        like = _continued(reference, "greedy_sequence", prompt)
        sequence, logits = greedy_text(model, params, prompt, np.ones_like(prompt), like)
        reference.compare_tokens("greedy_sequence", sequence)
        reference.compare("greedy_logits", logits)
    if reference.has("batch_greedy_sequences", "batch_prompt", "batch_prompt_mask"):
        prompt = reference.ids("batch_prompt", config.vocab_size)
        mask = reference.mask("batch_prompt_mask", prompt)
        like = _continued(reference, "batch_greedy_sequences", prompt)
        sequences, _ = greedy_text(model, params, prompt, mask, like)
        reference.compare_tokens("batch_greedy_sequences", sequences)


def _continued(reference, name, prompt):
    """The reference's tokens [B, L + steps] of prompts [B, L]. Raises UserError where they do not continue it."""
    found = reference.input(name, (len(prompt), None), np.integer)
    if found.shape[1] <= prompt.shape[1]:
        raise UserError(
            f"expected.npz: {name} has {found.shape[1]} tokens, no more than the prompt's {prompt.shape[1]}"
        )
    return found


def _verify_text(checkpoint, reference, model, params):
    config = checkpoint.config
    tokens, positions, segment_ids = text_inputs(reference, config.vocab_size)
    real = segment_ids > 0

    def forward(params):
        bound = model.bind({"params": params})
        embeddings = embed(bound, tokens, checkpoint.public_config)
        hidden, _ = bound.run(embeddings, positions, segment_ids)
        return bound.logits(hidden), (embeddings, bound.norm(hidden))

    logits, (embeddings, normed) = with_loss(forward, reference, params, checkpoint.to_public)
    reference.compare("logits", logits, real)
    reference.compare("embeddings", embeddings)
    reference.compare("hidden_final_normed", normed, real)
    if "hidden_after_layer1" in reference and config.stack.num_layers == 1:
        reference.compare("hidden_after_layer1", normed, real)  # transformers' last hidden state is the normed one
    elif "hidden_after_layer1" in reference and config.stack.num_layers:
        first = jax.tree.map(lambda leaf: leaf[:1], params["stack"]["layers"])
        stack = Stack(dataclasses.replace(config.stack, num_layers=1), EXECUTION)
        hidden, _ = stack.apply({"params": {"layers": first}}, embeddings, positions, segment_ids)
        reference.compare("hidden_after_layer1", hidden, real)


def greedy_text(
    model: LanguageModel, params: Params, prompts: np.ndarray, mask: np.ndarray, like: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens after LEFT-padded prompts [B, L], each from a full forward pass over rows without that padding.

    Args:
      like: [B, L + steps], the shape of the result.
    Returns:
      (prompts and tokens [B, L + steps], raw logits [B, steps, V]).
    """
    lengths, steps = mask.sum(1), like.shape[1] - prompts.shape[1]
    rows = np.zeros(like.shape, np.int32)
    for row, prompt, length in zip(rows, prompts, lengths, strict=True):
        row[:length] = prompt[len(prompt) - length :]
    index = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    forward, found, every = jax.jit(model.apply), [], np.arange(len(rows))
    for step in range(steps):
        ends = lengths + step
        logits = forward({"params": params}, rows, index, (index < ends[:, None]).astype(np.int32))
        found.append(np.asarray(logits)[every, ends - 1])
        rows[every, ends] = found[-1].argmax(-1)
    new = np.stack([row[length : length + steps] for row, length in zip(rows, lengths, strict=True)])
    return np.concatenate([prompts, new], axis=1), np.stack(found, axis=1)
