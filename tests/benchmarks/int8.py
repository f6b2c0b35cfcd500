"""What int8 weights change: tokens of a text that int8 would have chosen otherwise, and easy-VQA's score.

    python tests/benchmarks/int8.py --checkpoint smol-llm
    python tests/benchmarks/int8.py --checkpoint runs/instruct --questions 2000

Teacher-forced: float32 answers prompts greedily; both read these answers, and of each of their tokens it is asked
whether int8 would have made the same. Questions of easy-VQA's test split are spread evenly. Prints one JSON object.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

import hovle_jax
from hovle_jax.conversion.downloads import resolve
from hovle_jax.evaluation.easy_vqa import questions
from hovle_jax.inference import slots as programs
from hovle_jax.inference.caches import One, kind_for
from hovle_jax.inference.engine import Engine, Request
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.load import load_run
from hovle_jax.inference.slots import Slots
from hovle_jax.inference.weights import is_int8

PROMPTS = (
    "Write a long story about a robot that learns to paint.",
    "Explain how a steam engine works.",
    "List ten facts about whales.",
    "Write a letter to a friend about a journey to the sea.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me how bread is baked, step by step.",
    "Describe a market in an old town in the morning.",
    "Why is the sky blue, and why are sunsets red?",
)


def choices(hovle, params, tokens: jax.Array) -> jax.Array:
    """[n] int32: what an LLM alone would say after each of the tokens [n], read at once."""
    n = len(tokens)
    state = Slots.empty(hovle, 1, n, n, 0, kind_for("", is_int8(params)))
    llm = hovle.llm.bind({"params": params["llm"]})
    x, _ = programs._run(
        hovle.config.llm.stack, hovle.execution, params["layers"]["llm"], llm.token_embedding(tokens)[None],
        jnp.arange(n)[None], state.llm, One(jnp.int32(0), jnp.int32(0), n), jnp.int32(n),
    )  # fmt: skip
    return jnp.argmax(programs._logits(params, hovle, x[0]), axis=-1)


def agreement(name: str, new_tokens: int) -> dict:
    """How often int8 chooses what float32 chose, over its own answers."""
    answerer = load_run(resolve(name), dtype="float32").answerer
    hovle = answerer.hovle
    sides = {int8: programs.fused(answerer.params, hovle, int8) for int8 in (False, True)}
    engine = Engine(answerer, len(PROMPTS), 512, params=sides[False])
    streams = [engine.submit(Prompt.of(text), Request(new_tokens)) for text in PROMPTS]
    engine.run()
    choose = jax.jit(lambda params, tokens: choices(hovle, params, tokens))
    same = total = 0
    for stream in streams:
        tokens = np.concatenate([stream.reading.tokens, stream.tokens]).astype(np.int32)
        first = stream.reading.length - 1
        ours, theirs = (np.asarray(choose(sides[int8], tokens))[first:-1] for int8 in (True, False))
        assert (theirs == stream.tokens).mean() > 0.99, "the engine and the reading at once differ"
        same, total = same + int((ours == theirs).sum()), total + len(ours)
    return {"tokens": total, "the same": round(same / total, 4)}


def easy_vqa(name: str, count: int) -> dict:
    """The score of both on the same questions, and how many answers are the same."""
    asked = list(questions())[:: -(-9673 // count)]
    said = {}
    for dtype in ("float32", "int8"):
        model = hovle_jax.load(resolve(name), dtype=dtype, slots=32, length=128)
        streams = [model.engine.submit(Prompt(item.turns, item.images, item.system), Request(8)) for item in asked]
        model.engine.run()
        said[dtype] = [stream.text for stream in streams]
    right = {
        dtype: sum(text == item.references[0] for text, item in zip(texts, asked)) / len(asked)
        for dtype, texts in said.items()
    }
    same = sum(a == b for a, b in zip(*said.values())) / len(asked)
    return {"questions": len(asked), "right": {k: round(v, 4) for k, v in right.items()}, "the same": round(same, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smol-llm")
    parser.add_argument("--new_tokens", type=int, default=160)
    parser.add_argument("--questions", type=int, default=0, help="of easy-VQA, for a model that sees images")
    arguments = parser.parse_args()
    if arguments.questions:
        found = easy_vqa(arguments.checkpoint, arguments.questions)
    else:
        found = agreement(arguments.checkpoint, arguments.new_tokens)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
