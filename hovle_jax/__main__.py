"""The commands: a list of them, and `hovle NAME ...` for `python -m hovle_jax.NAME ...`.

    hovle                                              lists the commands
    hovle train --config configs/distill.py            as python -m hovle_jax.train

Neither imports JAX for the list: a command is a module of this folder that can be run, and its line is its docstring's.
"""

import ast
import difflib
import pathlib
import runpy
import sys

FOLDER = pathlib.Path(__file__).parent


def commands(folder: pathlib.Path = FOLDER) -> dict[str, str]:
    """{name: one line about it} of the modules and packages in the folder that are commands."""
    files = [(path.stem, path) for path in folder.glob("*.py") if not path.stem.startswith("_")]
    files += [(path.parent.name, path) for path in folder.glob("*/__main__.py")]
    return {name: _line(path) for name, path in sorted(files) if "__main__" in path.read_text("utf-8")}


def _line(path):
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]


def listing() -> str:
    """What is printed without a command."""
    known = commands()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {line}" for name, line in known.items()]
    return "\n".join(["usage: hovle COMMAND [options]; hovle COMMAND --help lists its options", "", *lines])


def main() -> None:
    """Runs the command that the first argument names, as `python -m` would; prints the list without one."""
    name, rest = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if name in ("help", "--help", "-h"):
        print(listing())
        return
    known = commands()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        print(f"error: unknown command {name!r}; {remedy}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [name, *rest]
    runpy.run_module(f"hovle_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
