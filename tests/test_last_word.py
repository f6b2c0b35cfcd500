"""What is said of a process that dies without a word."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHILD = """
import logging, os, pathlib, sys, warnings
from hovle_jax.system.last_word import last_word
with last_word(pathlib.Path(sys.argv[1]) / "traces" / "host_00000.txt", "error: it is gone") as word:
    os.write(2, b"dozens of lines of a library\\n" * int(sys.argv[2] != "quiet"))
    print("of Python", file=sys.stderr)
    if sys.argv[2] == "dies":
        os.abort()
os.write(2, b"as before\\n")
"""


def child(folder, how):
    line = [sys.executable, "-c", CHILD, str(folder), how]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def test_a_process_that_dies_has_one_line_and_what_libraries_said_is_in_a_file(tmp_path):
    ended = child(tmp_path, "dies")
    assert ended.returncode == -6 and ended.stderr == "of Python\nerror: it is gone\n"
    assert (tmp_path / "traces" / "host_00000.txt").read_text() == "dozens of lines of a library\n"


@pytest.mark.parametrize("how, kept", [("ends", True), ("quiet", False)])
def test_a_process_that_ends_has_none(tmp_path, how, kept):
    ended = child(tmp_path, how)
    assert ended.returncode == 0 and ended.stderr == "of Python\nas before\n"
    assert (tmp_path / "traces").exists() == kept


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "traces").write_text("a file")
    ended = child(tmp_path, "ends")
    assert ended.returncode == 0 and ended.stderr.endswith("of Python\nas before\n")
