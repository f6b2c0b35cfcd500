"""docs/extending.md, done: every block is applied to a copy of the project, and what it adds is used there."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import extended

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"```python (file|add|replace)=(\S+)(?: (?:after|line)='([^\n]*)')?\n(.*?)```", re.DOTALL)
MOST_FILES = 2  # that an addition touches, beside its config


def sections():
    """{title: its blocks [(kind, path, line, text)]}."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {title: BLOCK.findall(text) for title, text in zip(parts[::2], parts[1::2])}


def apply(root, kind, path, line, text):
    """One block, on a copy of the project."""
    file = root / path
    if kind == "file":
        assert not file.exists()
        file.write_text(text)
        return
    before = file.read_text().splitlines()
    found = [i for i, content in enumerate(before) if content.startswith(line)]
    assert len(found) == 1, f"{path} has {len(found)} lines that start with {line!r}"
    kept = before[: found[0] + (kind == "add")]
    file.write_text("\n".join([*kept, *text.splitlines(), *before[found[0] + 1 :]]) + "\n")


@pytest.fixture
def found(tmp_path_factory):
    """{section: '' or what went wrong} of the copy that has everything of the page."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("hovle_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for blocks in sections().values():
        for block in blocks:
            apply(root, *block)
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    command = [sys.executable, "-m", "tests.extended", str(root / "work")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_addition_works(found):
    """One test, as the copy is made and used once."""
    assert found == dict.fromkeys(sections(), "")


def test_every_section_is_tried():
    assert set(extended.CHECKS) == set(sections()) and all(sections().values())


@pytest.mark.parametrize("title", sections())
def test_an_addition_touches_few_files(title):
    files = {path for _, path, *_ in sections()[title] if not path.startswith("configs/")}
    assert 1 <= len(files) <= MOST_FILES
