"""An LLM alone: logits, features, loss, gradients and greedy tokens of text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from hovle_jax.model.transformer import Stack

IGNORED = -100
EXECUTION = Execution()


def shifted_loss(logits, labels):
    """Mean cross-entropy of logits [B, L, V] against labels [B, L] shifted by one, `IGNORED` left out."""
    targets, scores = labels[:, 1:], jax.nn.log_softmax(logits[:, :-1])
    weights = targets != IGNORED
    chosen = jnp.take_along_axis(scores, jnp.where(weights, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights, chosen, 0)) / jnp.sum(weights)


def text_inputs(report, vocab_size):
    """-> (tokens, positions, segment_ids), each [B, L] int32; padding is segment 0."""
    tokens = report.ids("input_ids", vocab_size)
    mask = report.mask("attention_mask", tokens) if "attention_mask" in report else np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, mask


def embed(llm, tokens, public_config):
    """Token vectors. The padding id's row learns nothing as input: public code has it as torch's `padding_idx`."""
    x = llm.token_embedding(tokens)
    padding = public_config.get("pad_token_id", 0 if llm.config.family == "internlm2" else None)
    return x if padding is None else jnp.where((tokens == padding)[..., None], jax.lax.stop_gradient(x), x)


def with_loss(forward, report, params, rules):
    """Runs forward(params) -> (logits [B, L, V], more); compares loss and gradients where there are labels."""
    if "labels" not in report:
        return jax.jit(forward)(params)
    labels = _labels(report, jax.eval_shape(forward, params)[0].shape[-1])

    def loss(params):
        logits, more = forward(params)
        return shifted_loss(logits, labels), (logits, more)

    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    report.compare("loss", value)
    report.compare_gradients(to_public(rules, gradients))
    return outputs


def _labels(report, vocab_size):
    """[B, L] int32. Raises UserError where there is nothing to learn, or an id that is none."""
    labels = report.input("labels", report.arrays["input_ids"].shape, np.integer)
    counted = labels[:, 1:][labels[:, 1:] != IGNORED]
    if not counted.size:
        raise UserError(f"expected.npz: labels are {IGNORED} everywhere behind the first token: there is no loss")
    if not 0 <= counted.min() <= counted.max() < vocab_size:
        raise UserError(f"expected.npz: labels have ids {counted.min()} to {counted.max()}, and there are {vocab_size}")
    return labels.astype(np.int32)


def verify_llm(checkpoint, report):
    """All that expected.npz has of an LLM."""
    config, params = checkpoint.config, checkpoint.load()
    model = LanguageModel(config, EXECUTION)
    if report.has("input_ids"):
        _verify_text(checkpoint, report, model, params)
    if report.has("greedy_sequence", "greedy_prompt"):
        prompt = report.ids("greedy_prompt", config.vocab_size)
        like = _continued(report, "greedy_sequence", prompt)
        sequence, logits = greedy_text(model, params, prompt, np.ones_like(prompt), like)
        report.compare_tokens("greedy_sequence", sequence)
        report.compare("greedy_logits", logits)
    if report.has("batch_greedy_sequences", "batch_prompt", "batch_prompt_mask"):
        prompt = report.ids("batch_prompt", config.vocab_size)
        mask = report.mask("batch_prompt_mask", prompt)
        like = _continued(report, "batch_greedy_sequences", prompt)
        sequences, _ = greedy_text(model, params, prompt, mask, like)
        report.compare_tokens("batch_greedy_sequences", sequences)


def _continued(report, name, prompt):
    """The reference's tokens [B, L + steps] of prompts [B, L]. Raises UserError where they are no continuation."""
    found = report.input(name, (len(prompt), None), np.integer)
    if found.shape[1] <= prompt.shape[1]:
        raise UserError(
            f"expected.npz: {name} has {found.shape[1]} tokens, no more than the prompt's {prompt.shape[1]}"
        )
    return found


def _verify_text(checkpoint, report, model, params):
    config = checkpoint.config
    tokens, positions, segment_ids = text_inputs(report, config.vocab_size)
    real = segment_ids > 0

    def forward(params):
        bound = model.bind({"params": params})
        embeddings = embed(bound, tokens, checkpoint.public_config)
        hidden, _ = bound.run(embeddings, positions, segment_ids)
        return bound.logits(hidden), (embeddings, bound.norm(hidden))

    logits, (embeddings, normed) = with_loss(forward, report, params, checkpoint.rules)
    report.compare("logits", logits, real)
    report.compare("embeddings", embeddings)
    report.compare("hidden_final_normed", normed, real)
    if "hidden_after_layer1" in report and config.stack.num_layers == 1:
        report.compare("hidden_after_layer1", normed, real)  # transformers' last hidden state is the normed one
    elif "hidden_after_layer1" in report and config.stack.num_layers:
        first = jax.tree.map(lambda leaf: leaf[:1], params["stack"]["layers"])
        stack = Stack(dataclasses.replace(config.stack, num_layers=1), EXECUTION)
        hidden, _ = stack.apply({"params": {"layers": first}}, embeddings, positions, segment_ids)
        report.compare("hidden_after_layer1", hidden, real)


def greedy_text(model, params, prompts, mask, like):
    """Greedy tokens behind LEFT-padded prompts [B, L], each from a full forward over rows that begin at the left.

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
