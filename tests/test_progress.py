"""Lines of long work that cannot tell how far it is."""

import threading

import pytest

from hovle_jax.system.progress import waiting


def test_it_says_what_begins_how_long_it_has_taken_and_that_it_is_done():
    said, twice = [], threading.Event()

    def say(line):
        said.append(line)
        if len(said) == 3:
            twice.set()

    with waiting("compiling", say, every=0.01):
        assert twice.wait(10)
    assert said[:3] == ["compiling ...", "compiling: 0:00:00 so far", "compiling: 0:00:00 so far"]
    assert said[-1].startswith("compiling: done in 0:00:")
    count = len(said)
    assert not [thread for thread in threading.enumerate() if "tell" in thread.name] and len(said) == count


def test_work_that_fails_is_not_said_to_be_done():
    said = []
    with pytest.raises(ValueError), waiting("compiling", said.append, every=60):
        raise ValueError
    assert said == ["compiling ..."]
