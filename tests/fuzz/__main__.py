"""Reads mutated files with the project's own readers and says what is neither read nor refused in one line.

    python -m tests.fuzz --inputs 2000                       every reader
    python -m tests.fuzz --inputs 50000 --seed 7 --reader gguf --reader npz
    python -m tests.fuzz --reader gguf --replay FOLDER       one input that was kept, with its trace

A finding is any exception but a UserError or a BadSample, a process that ends, more than a few seconds, or more than
1 GiB. The inputs of a seed are always the same. Findings are kept in --kept, the first three of each kind.
"""

import argparse
import pathlib
import sys
import tempfile
import time


def main(arguments: list[str] | None = None) -> int:
    """The number of kinds of findings."""
    from tests.fuzz.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first input")
    parser.add_argument("--reader", action="append", choices=READERS, help="may be repeated; all if not given")
    parser.add_argument("--kept", type=pathlib.Path, default=None, help="where findings go; a new folder if not given")
    parser.add_argument("--replay", type=pathlib.Path, default=None, help="a folder with one input")
    options = parser.parse_args(arguments)
    names = options.reader or list(READERS)
    if options.replay:
        return replay(names[0], options.replay)
    from tests.fuzz.run import fuzz

    kept = options.kept or pathlib.Path(tempfile.mkdtemp(prefix="hovle_jax_fuzz_"))
    kinds = 0
    for name in names:
        result = fuzz(name, options.inputs, options.seed, kept, options.start)
        kinds += len(result.findings)
        share = result.refused / max(1, result.inputs)
        print(
            f"{time.strftime('%T')} {name}: {result.inputs:,} inputs, {share:.0%} refused, {result.seconds:.0f} s, "
            f"{result.findings.total()} findings of {len(result.findings)} kinds",
            flush=True,
        )
        for kind, number in result.findings.most_common():
            print(f"    {number} x {kind}", flush=True)
    print(f"findings are in {kept}" if kinds else "nothing found")
    return kinds


def replay(name: str, folder: pathlib.Path) -> int:
    """Reads the files of a folder, without limits."""
    from tests.fuzz.readers import READERS

    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "trace"}
    with tempfile.TemporaryDirectory() as place:
        READERS[name].read(files, pathlib.Path(place))
    print("it is read")
    return 0


if __name__ == "__main__":
    sys.exit(min(main(), 100))
