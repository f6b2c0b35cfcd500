"""Numbers that mean nothing are refused by name, before anything is built."""

import dataclasses

import pytest

from hovle_jax.errors import UserError
from hovle_jax.system import command_line
from hovle_jax.training import checks
from hovle_jax.training.check_numbers import AT_LEAST, check_numbers
from tests import micro


def changed(key, value):
    """The micro config with one key changed."""
    config, (*parts, name) = micro.run_config("instruct"), key.split(".")
    if not parts:
        return dataclasses.replace(config, **{name: value})
    part = dataclasses.replace(getattr(config, parts[0]), **{name: value})
    return dataclasses.replace(config, **{parts[0]: part})


WRONG = {
    **{key: [least - 1, -4] for key, (least, _) in AT_LEAST.items()},
    "seed": [-1, 2**32],
    "optimizer.learning_rate": [-1.0, float("nan"), float("inf")],
    "optimizer.final_fraction": [-0.1, 1.5],
    "optimizer.weight_decay": [-0.1],
    "optimizer.b1": [1.0, -0.1],
    "optimizer.b2": [1.0, 1.5],
    "optimizer.eps": [0.0],
    "optimizer.clip_norm": [0.0, -1.0, float("nan")],
    "health.on_bad_step": ["ignore"],
    "health.spike_sigmas": [-1.0, float("nan"), float("inf")],
    "health.watchdog_seconds": [-1.0, float("nan")],
    "health.on_hang": ["panic"],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_a_number_out_of_its_range_is_named(key, value):
    with pytest.raises(UserError, match=f"^{key}={value} must be "):
        checks.check(changed(key, value))


@pytest.mark.parametrize("key, value", [(key, least) for key, (least, _) in AT_LEAST.items()])
def test_the_least_number_will_do(key, value):
    check_numbers(changed(key, value))


def test_every_key_of_the_table_is_one_of_a_run():
    config = micro.run_config("instruct")
    for key in AT_LEAST:
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        assert isinstance(value, int), key


def test_a_warm_up_as_long_as_the_run_is_said_once(capsys):
    command_line.warn.cache_clear()
    config = dataclasses.replace(changed("optimizer.warmup_steps", 50), steps=40)
    check_numbers(config)
    check_numbers(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: optimizer.warmup_steps=50 is not below steps=40")
    check_numbers(dataclasses.replace(config, steps=51))
    assert not capsys.readouterr().err
