"""Compares runs: a table of results, costs and config differences, and a plot of their curves.

    python -m hovle_jax.compare runs_a runs_b                        # all stages of two chains
    python -m hovle_jax.compare runs/instruct runs_mine/instruct     # two runs
    python -m hovle_jax.compare runs_seeds --out comparison          # what `train --seeds 3` wrote

Runs whose configs differ only in the seed get a mean and a sample standard deviation.
"""

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.system import command_line

USAGE = "python -m hovle_jax.compare RUN RUN... [--out=DIR]; a RUN is the folder of a run or of a chain"
OUT = flags.DEFINE_string("out", ".", "The folder of compare.png")


def main(arguments: list[str]) -> None:
    if not arguments:
        raise UserError(f"usage: {USAGE}")
    from hovle_jax.report.comparison import compare

    print(compare(arguments, OUT.value))


if __name__ == "__main__":
    command_line.run(main, USAGE)
