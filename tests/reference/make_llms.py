"""Makes the LLM fixtures in tests/golden: tiny random checkpoints and what `transformers` computes with them.

    pip install -e ".[reference]" && python tests/reference/make_llms.py

An independent oracle for options that published checkpoints have: biases, scaled rotary
positions, head sizes. InternLM2 has no code in transformers; its layer is Llama's with packed projections.
"""

import json

import torch
from common import llm_names, randomize, write
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = dict(
    vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LENGTH, NEW_TOKENS = 40, 8


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


MODELS = {
    "llama-biases": (LlamaConfig, LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True)),
    "llama-yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=0.5),
    ),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, rope("linear", factor=2.0) | dict(head_dim=12)),
    "llama-dynamic": (LlamaConfig, LlamaForCausalLM, rope("dynamic", factor=2.0) | dict(tie_word_embeddings=True)),
    "qwen2-one-kv-head": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=1, rms_norm_eps=1e-5)),
    "qwen3-biases": (Qwen3Config, Qwen3ForCausalLM, dict(attention_bias=True, head_dim=8)),
    "internlm2-biases": (LlamaConfig, LlamaForCausalLM, dict(attention_bias=True)),
}


def run(model):
    """-> the arrays of expected.npz."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, LENGTH - 7 :] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    out = model(input_ids=tokens, attention_mask=mask, labels=labels, output_hidden_states=True)
    out.loss.backward()
    arrays = {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": labels,
        "logits": out.logits,
        "loss": out.loss,
        "hidden_after_layer1": out.hidden_states[1],
        "hidden_final_normed": out.hidden_states[-1],
    }
    prompt, sequence = tokens[:1, :6], tokens[:1, :6]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            sequence = torch.cat([sequence, model(input_ids=sequence).logits[:, -1:].argmax(-1)], dim=1)
    return arrays | {"greedy_prompt": prompt, "greedy_sequence": sequence}


def main():
    for name, (config_class, model_class, options) in MODELS.items():
        config = config_class(**(SIZES | options), attn_implementation="eager")
        model = model_class(config).float()
        randomize(model)
        arrays = run(model)
        tensors = {key: x.detach().contiguous() for key, x in model.named_parameters()}
        gradients = {key: x.grad for key, x in model.named_parameters()}
        public = json.loads(config.to_json_string(use_diff=False))
        keep = (*SIZES, *options, "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act")
        public = {key: public[key] for key in ("model_type", *dict.fromkeys(keep)) if key in public}
        if name.startswith("internlm2"):
            public = {k: x for k, x in public.items() if k not in ("attention_bias", "head_dim", "rope_parameters")}
            public |= {"model_type": "internlm2", "bias": True, "rope_theta": 10000.0}
        names = llm_names(public)
        gradients = {f"grad.{key}": x for key, x in names.to_public(gradients).items()}
        arrays |= {key: x for key, x in gradients.items() if ".1." in key or "layers" not in key}
        write(name, public, names.to_public(tensors), arrays)


if __name__ == "__main__":
    main()
