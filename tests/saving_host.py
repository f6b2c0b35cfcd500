"""Saves a small state again and again, until it is killed: `python -m tests.saving_host FOLDER`, or a URL.

It says which step it goes on from and which are complete, so that the test can compare the newest checkpoint with them.
"""

import itertools
import pathlib
import sys
import time

from hovle_jax.system.mirror import Mirror
from hovle_jax.system.remote import is_url
from hovle_jax.training.resumable import RunCheckpoints
from hovle_jax.training.saved_steps import Keep
from tests.test_saves import assert_is, state_of


def main(place: str) -> None:
    mirror = Mirror(place) if is_url(place) else None
    if mirror:
        mirror.pull()
    folder = mirror.folder / "run" if mirror else pathlib.Path(place)
    folder.mkdir(exist_ok=True)
    with RunCheckpoints(folder, Keep(2), mirror=mirror) as saved:
        first = saved.latest or 0
        if saved.latest is not None:
            assert_is(saved.restore(state_of(0)), saved.latest)
        print("from", first, flush=True)
        for step in itertools.count(first + 1):
            with (folder / "rows").open("w") as rows:
                rows.writelines(f"{row}\n" for row in range(step))
            saved.save(step, state_of(step))
            print("saved", saved.latest, flush=True)
            time.sleep(0.001)


if __name__ == "__main__":
    main(sys.argv[1])
