"""What the project says about itself: packages, versions, hooks, the tools that CI uses."""

import ast
import pathlib
import re

import pytest
import yaml

import hovle_jax
from tests.benchmarks.annotations import functions_in, functions_of
from tests.launch_tools import ROOT

SETUP = (ROOT / "setup.py").read_text()
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))


def test_every_folder_with_code_is_a_package():
    package = pathlib.Path(hovle_jax.__file__).parent
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == [] and len(folders) > 15
    assert 'find_packages(include=["hovle_jax", "hovle_jax.*"])' in SETUP


def required():
    """Names of the packages that setup.py asks for always, and in the extra test."""
    lists = [node for node in ast.walk(ast.parse(SETUP)) if isinstance(node, ast.keyword | ast.Assign)]
    named = {
        getattr(node, "arg", None) or getattr(getattr(node, "targets", [0])[0], "id", ""): node.value for node in lists
    }
    texts = [
        n.value
        for key in ("install_requires", "TEST", "CONVERT")
        for n in ast.walk(named[key])
        if isinstance(n, ast.Constant)
    ]
    return {re.split(r"[<>=\[]", text)[0] for text in texts}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locked_versions_are_names_and_versions(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line) for line in lines)
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    locked = {plain(line.split("==")[0]) for line in lines}
    assert {plain(name) for name in required()} <= locked and len(required()) > 20
    assert {"ruff", "basedpyright", "pdoc", "libtpu"} <= locked


def test_there_is_a_lock_for_each_python():
    assert [path.stem for path in LOCKS] == ["py311", "py312"]


def test_hooks_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} >= {"ruff", "basedpyright"}
    assert all(hook["language"] == "system" for hook in hooks)


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "basedpyright", "python -m pytest", "-m quick"])
def test_ci_runs_what_contributing_names(tool):
    assert tool in (ROOT / ".ci" / "run").read_text() and tool in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_changelog_has_this_version():
    assert f"## [{hovle_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_functions_say_their_types():
    missing = [f"{f.place}: {f.name}" for f in functions_in(ROOT / "hovle_jax") if not f.annotated]
    assert not missing


def test_types_of_public_functions_are_counted():
    source = """
def one() -> int: ...
def two(): ...
def _three(): ...
class A:
    def four(self) -> None:
        def inner(): ...
    def __init__(self): ...
    async def five(self): ...
    @staticmethod
    def six(x) -> int: ...
    def seven(self, x: int, *, y) -> int: ...
class _B:
    def eight(self): ...
"""
    found = {function.name: function.annotated for function in functions_of(source)}
    assert found == {"one": True, "two": False, "A.four": True, "A.five": False, "A.six": False, "A.seven": False}
