"""`generate` with a model that says which host it is on: python -m tests.answering_host FLAGS."""

import time

import jax

from hovle_jax import generate
from hovle_jax.inference import many
from hovle_jax.system import command_line


def answered(model, questions, system, options):
    """Host 1 is the slower one, so that host 0 has to wait."""
    for question in questions:
        time.sleep(0.1 * jax.process_index())
        yield question.row | {"answer": f"host {jax.process_index()}"}


if __name__ == "__main__":
    many.answer_rows, generate.load = answered, lambda: None
    command_line.run(generate.main)
