"""What llama.cpp answers to a GGUF file, by the package xllamacpp (extra `llama_cpp`).

In a process of its own, as llama.cpp ends the whole process where a file is not what it expects:

    python tests/llama_cpp.py FILE.gguf < requests.json > answers.json
"""

import json
import os
import subprocess
import sys

import pytest


def completions(path, requests):
    """llama.cpp's answers to `/v1/completions` requests, in order, each with its most likely tokens; in float32.

    Skips the test without the package.
    """
    pytest.importorskip("xllamacpp", reason="the extra llama_cpp is not installed")
    result = subprocess.run(
        [sys.executable, __file__, str(path)], input=json.dumps(requests), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def greedy(path, prompts, tokens):
    """-> [(token ids, log-probabilities)] of greedy answers of exactly this length, to prompts of ids."""
    settings = dict(temperature=0, n_predict=tokens, n_probs=1, cache_prompt=False)
    answers = completions(path, [settings | {"prompt": list(map(int, prompt))} for prompt in prompts])
    made = [answer["choices"][0]["logprobs"]["content"] for answer in answers]
    return [([token["id"] for token in row], [token["logprob"] for token in row]) for row in made]


def _server(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def main():
    out = os.dup(1)
    os.dup2(2, 1)  # llama.cpp prints to both
    server = _server(sys.argv[1])
    answers = [server.handle_completions(request) for request in json.load(sys.stdin)]
    os.write(out, json.dumps(answers).encode())
    os._exit(0)  # its threads wait for more


if __name__ == "__main__":
    main()
