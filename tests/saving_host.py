"""Saves a small state again and again, until it is killed: `python -m tests.saving_host FOLDER`.

It says each step that is complete, and so has the test something to compare the newest checkpoint with.
"""

import itertools
import sys
import time

from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep
from tests.test_saves import state_of


def main(folder: str) -> None:
    with RunCheckpoints(folder, Keep(2)) as saved:
        first = saved.latest or 0
        if saved.latest is not None:
            print("restored", int(saved.restore(state_of(0)).step), flush=True)
        for step in itertools.count(first + 1):
            saved.save(step, state_of(step))
            print("saved", saved.latest, flush=True)
            time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1])
