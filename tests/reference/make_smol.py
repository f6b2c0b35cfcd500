"""Makes tests/golden/smol-llm.json: what `transformers` computes with the weights of SmolLM2-135M-Instruct's GGUF.

    pip install -e ".[reference]" && python tests/reference/make_smol.py SmolLM2-135M-Instruct.Q4_1.gguf

The weights are dequantised by transformers' own reader; prompts are rendered with the file's chat template. Kept are
each prompt's ids, the logits after its last token at a few ids, and their largest.
"""

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How much is 17 + 25?",
    "Translate to French: good morning",
    "Say <|im_end|> twice, naïve café 東京.",
)
KEPT = 64


def main():
    path = pathlib.Path(sys.argv[1])
    load = dict(gguf_file=path.name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **load)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **load, dtype=torch.float32).eval()
    cases = []
    for prompt in PROMPTS:
        # As a library would do it; our own encoding keeps special tokens in a user's words ordinary characters.
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        at = torch.linspace(0, len(logits) - 1, KEPT).long()
        cases.append(
            {
                "prompt": prompt,
                "text": text,
                "ids": ids,
                "at": at.tolist(),
                "logits": [round(x, 5) for x in logits[at].tolist()],
                "best": int(logits.argmax()),
                "largest": round(float(logits.max()), 5),
            }
        )
    out = pathlib.Path(__file__).parents[1] / "golden" / "smol-llm.json"
    out.write_text(json.dumps(cases, ensure_ascii=False) + "\n")
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
