"""--show and the names of mistyped keys: every key has a meaning, and a near miss names the key that was meant."""

import dataclasses

import pytest

from hovle_jax.config import RunConfig
from hovle_jax.recipes import base
from hovle_jax.system import config_help
from tests import micro


@dataclasses.dataclass(frozen=True)
class Inner:
    """What is inside.

    Attributes:
      first, second: a meaning of
        two lines.
    """

    first: int = 1
    second: int = 2
    third: str = "é"  # said behind the field
    fourth: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    """The whole."""

    inner: Inner = Inner()
    other: Inner | None = None


def test_a_meaning_is_read_from_the_docstring_or_the_comment():
    assert config_help.meanings_of(Inner) == {
        "first": "a meaning of two lines", "second": "a meaning of two lines", "third": "said behind the field"
    }  # fmt: skip
    found = [(entry.key, entry.value, entry.meaning) for entry in config_help.entries_of(Outer, Outer())]
    assert found == [
        ("config.inner.first", 1, "a meaning of two lines"),
        ("config.inner.second", 2, "a meaning of two lines"),
        ("config.inner.third", "é", "said behind the field"),
        ("config.inner.fourth", 0.5, ""),
        ("config.other", None, "What is inside."),
    ]


def test_every_key_of_a_run_has_a_meaning():
    entries = list(config_help.entries_of(RunConfig))
    assert len(entries) > 100 and any(entry.key.endswith("llm.stack.rope_scaling.kind") for entry in entries)
    assert [entry.key for entry in entries if not entry.meaning] == []


def test_all_keys_are_shown_a_line_each():
    config = RunConfig.from_dict(base("instruct", "tiny").to_dict())
    lines = config_help.text_of(config).splitlines()
    keys = [entry.key for entry in config_help.entries_of(RunConfig, config)]
    assert [line.split()[0] for line in lines] == keys
    (rate,) = [line for line in lines if line.startswith("config.optimizer.learning_rate ")]
    assert rate.split()[1] == "0.001" and rate.endswith("the peak, reached after the warm-up")


def test_a_model_that_a_run_does_not_have_is_one_line():
    config = dataclasses.replace(micro.run_config("align"), clip=None)
    assert "config.clip" in [line.split()[0] for line in config_help.text_of(config).splitlines()]


@pytest.mark.parametrize(
    "key, meant",
    [
        ("optimizer.lr", "config.optimizer.learning_rate"),
        ("lr", "config.optimizer.learning_rate"),
        ("learning_rate", "config.optimizer.learning_rate"),
        ("optimizer.learning_rat", "config.optimizer.learning_rate"),
        ("batchsize", "config.data.batch_size"),
        ("data.tile", "config.data.tiles"),
        ("wd", "config.optimizer.weight_decay"),
        ("model.lmm.max_length", "config.model.llm.max_length"),
    ],
)
def test_a_near_miss_names_the_key(key, meant):
    assert config_help.nearest(key, RunConfig)[0] == meant


def test_a_word_like_no_key_names_none():
    assert config_help.nearest("zzz", RunConfig) == []
