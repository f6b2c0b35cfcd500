"""Fuzzing of everything that reads files of strangers; `python -m tests.fuzz --help`."""
