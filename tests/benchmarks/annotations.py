"""The share of public functions with types: of what they return and of each parameter.

    python tests/benchmarks/annotations.py [FOLDER]        default: hovle_jax
    python tests/benchmarks/annotations.py --missing       names those that do not, FILE:LINE a line

Public is what has no leading underscore, methods of public classes included; functions inside functions are not
counted. Reads the source alone. Prints one line: "37.5% of 1,024 public functions".
"""

import argparse
import ast
import dataclasses
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Function:
    """A public function: where it is, its dotted name in the file, and whether it says all its types."""

    place: str
    name: str
    annotated: bool


def functions_of(source: str, place: str = "") -> Iterator[Function]:
    """The public functions of a module's text."""
    yield from _walk(ast.parse(source).body, place, "")


def _walk(body, place, prefix):
    for node in body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _walk(node.body, place, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(f"{place}:{node.lineno}", prefix + node.name, _is_annotated(node, in_class=bool(prefix)))


def _is_annotated(node, in_class):
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    named = [*node.args.posonlyargs, *node.args.args][in_class and not static :] + node.args.kwonlyargs
    return node.returns is not None and all(argument.annotation for argument in named)


def functions_in(folder: pathlib.Path) -> list[Function]:
    """Of all modules below the folder."""
    files = sorted(folder.rglob("*.py"))
    return [found for file in files for found in functions_of(file.read_text("utf-8"), str(file.relative_to(folder)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=ROOT / "hovle_jax")
    parser.add_argument("--missing", action="store_true")
    arguments = parser.parse_args()
    found = functions_in(arguments.folder)
    for function in found if arguments.missing else []:
        if not function.annotated:
            print(f"{function.place}: {function.name}")
    share = sum(function.annotated for function in found) / max(1, len(found))
    print(f"{share:.1%} of {len(found):,} public functions")


if __name__ == "__main__":
    main()
