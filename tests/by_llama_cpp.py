"""What llama.cpp answers to a GGUF file, by the package xllamacpp (extra `llama_cpp`).

In a process of its own, as llama.cpp ends the whole process where a file is not what it expects:

    python tests/by_llama_cpp.py FILE.gguf < requests.json > answers.json
"""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

REASON = "llama.cpp is not installed (the extra llama_cpp)"


def skip_without():
    """Skips the test where the package is not installed; it is not imported: its runtime stays out of JAX's process."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip(REASON)


def completions(path, requests):
    """llama.cpp's answers to requests of OpenAI's completions, or of its chat completions, in order; in float32.

    Skips the test without the package.
    """
    skip_without()
    result = subprocess.run(
        [sys.executable, __file__, str(path)], input=json.dumps(requests), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def greedy(path, prompts, tokens, banned=()):
    """-> [(tokens read, token ids, log-probabilities)] of greedy answers to prompts: ids, texts or chats.

    A chat is a list of messages. `banned` are ids that no answer has.
    """
    settings = dict(temperature=0, max_tokens=tokens, cache_prompt=False)
    settings |= {"logit_bias": [[int(i), False] for i in banned]}
    found = []
    for answer in completions(path, [settings | _asked(prompt) for prompt in prompts]):
        made = answer["choices"][0]["logprobs"]["content"]
        found.append((answer["usage"]["prompt_tokens"], [t["id"] for t in made], [t["logprob"] for t in made]))
    return found


def _asked(prompt):
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        return {"messages": prompt, "logprobs": True, "top_logprobs": 1}
    return {"prompt": prompt if isinstance(prompt, str) else list(map(int, prompt)), "logprobs": 1}


def logits_of_vectors(path, x):
    """Logits [L, V] for input vectors [L, D] in place of ids, by the C interface of the package llama-cpp-python.

    Skips the test without the package. Flash attention, which computes in float16, is off.
    """
    library: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    x = np.ascontiguousarray(x, np.float32)
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    options = library.llama_context_default_params()
    options.n_ctx = options.n_batch = 256
    options.type_k = options.type_v = options.flash_attn_type = 0
    context = library.llama_init_from_model(model, options)
    batch = library.llama_batch_init(*x.shape, 1)
    ctypes.memmove(batch.embd, x.ctypes.data, x.nbytes)
    batch.n_tokens = len(x)
    for i in range(len(x)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 1
    assert library.llama_decode(context, batch) == 0
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(x))]
    library.llama_free(context)
    library.llama_model_free(model)
    return np.stack(rows)


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
    handle = lambda request: server.handle_chat_completions if "messages" in request else server.handle_completions
    answers = [handle(request)(request) for request in json.load(sys.stdin)]
    os.write(out, json.dumps(answers).encode())
    os._exit(0)  # its threads wait for more


if __name__ == "__main__":
    main()
