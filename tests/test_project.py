"""What the project says about itself: packages, versions, hooks, the tools that CI uses."""

import ast
import pathlib
import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    """The requirements of setup.py that CI installs: always, and in the extras test, convert, serve and data."""
    lists = [node for node in ast.walk(ast.parse(SETUP)) if isinstance(node, ast.keyword | ast.Assign)]
    named = {
        getattr(node, "arg", None) or getattr(getattr(node, "targets", [0])[0], "id", ""): node.value for node in lists
    }
    extras = {getattr(key, "value", ""): value for key, value in zip(*_items(named["extras_require"]))}
    places = [named[key] for key in ("install_requires", "TEST", "CONVERT", "SERVE", "LLAMA_CPP")]
    places += [extras[key] for key in ("tpu", "data", "dev", "docs")]
    return [
        Requirement(n.value)
        for place in places
        for n in ast.walk(place)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def _items(node):
    return node.keys, node.values


def locked(path):
    """{name: version} of a lock."""
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+!-]+) \\$", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_names_versions_and_hashes_and_nothing_else(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pins = [line for line in lines if not line.startswith(" ")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+ \\", line) for line in pins)
    hashes = [line for line in lines if line.startswith(" ")]
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)
    for line, following in zip(lines, [*lines[1:], "x"]):
        assert line.endswith("\\") == following.startswith(" "), "each version has hashes"
    assert {"ruff", "basedpyright", "pdoc", "libtpu", "hypothesis"} <= locked(path).keys()


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_satisfies_setup(path):
    found = locked(path)
    assert len(required()) > 30
    for requirement in required():
        version = found.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


def test_versions_with_known_holes_are_not_allowed():
    """A template left its sandbox, a Parquet file ran code, libwebp read beyond, an URL ran a shell command."""
    holes = {"jinja2": "3.1.5", "pyarrow": "14.0.0", "pillow": "11.2.1", "fsspec": "2026.4.0"}
    for name, version in holes.items():
        asked = [r for r in required() if canonicalize_name(r.name) == name]
        assert asked and not any(r.specifier.contains(version) for r in asked), name


def test_there_is_a_lock_for_each_python():
    assert [path.stem for path in LOCKS] == ["py311", "py312"]


def test_hooks_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} >= {"ruff", "basedpyright"}
    assert all(hook["language"] == "system" for hook in hooks)


@pytest.mark.parametrize("script", ["lock.sh", "audit.sh"])
def test_scripts_of_the_requirements_are_documented(script):
    assert f"requirements/{script}" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    "tool", ["--require-hashes", "ruff check", "ruff format --check", "basedpyright", "python -m pytest", "-m quick"]
)
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
