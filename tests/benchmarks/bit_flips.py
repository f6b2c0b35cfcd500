"""Flips random bits in the array files of a run's newest checkpoint, one at a time, and counts those that are seen.

    python tests/benchmarks/bit_flips.py                 # of a small state that is made for it
    python tests/benchmarks/bit_flips.py RUN [FLIPS]     # of a copy of a run's newest checkpoint

Prints the count and the time that comparing takes, alone and per gigabyte.
"""

import pathlib
import random
import shutil
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from hovle_jax.training import saved_steps


def flipped(newest: pathlib.Path, flips: int) -> int:
    """How many of so many flips are seen; each is taken back."""
    drawn, seen = random.Random(0), 0
    arrays = [path for path in newest.rglob("d/*") if path.is_file()]
    sizes = [path.stat().st_size for path in arrays]
    for _ in range(flips):
        (path,) = drawn.choices(arrays, sizes)
        bit = drawn.randrange(8 * path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(bit // 8)
            (before,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([before ^ 1 << bit % 8]))
            file.flush()
            seen += len(saved_steps.damage(newest)) == 1
            file.seek(bit // 8)
            file.write(bytes([before]))
    return seen


def main() -> None:
    flips = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            run = pathlib.Path(sys.argv[1]) / "checkpoints"
            made = pathlib.Path(folder) / "newest"
            shutil.copytree(list(saved_steps.step_folders(run).values())[-1], made)
        else:
            from tests.test_saves import save

            made = save(pathlib.Path(folder), 1) / "1"
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        started = time.perf_counter()
        assert not saved_steps.damage(made)
        took = time.perf_counter() - started
        print(f"{flipped(made, flips)} of {flips} flips are seen")
        print(f"comparing {size:,} bytes takes {took:.3f} s ({took / size * 1e9:.2f} s a GB)")


if __name__ == "__main__":
    main()
