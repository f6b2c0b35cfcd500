"""The search for the fastest way to run a step, with times that are given instead of forecast."""

import dataclasses
import json
import threading

import pytest

from hovle_jax.aot import plan
from hovle_jax.aot.compiling import TooLarge
from hovle_jax.aot.forecasting import Forecast
from hovle_jax.hardware import topology
from hovle_jax.report.compiled import plan_text
from tests.tpu_programs import compiled, libtpu, small


def planned(monkeypatch, seconds, of=None, **execution):
    """A plan where a config takes `seconds(config.execution)`; None: too large. -> (candidates, compiled configs)."""
    fitting, seen = compiled("instruct", "hovle"), []

    def compile_one(config, target):
        seen.append(config)
        took = seconds(config.execution)
        if took is None:
            error = TooLarge("too large")
            error.needed = 20e9
            raise error
        kinds = {"matmul": (took - 1, took - 1), "network": (0.5, 1.5)}
        speed = {"mfu": (0.5, 0.6), "tokens": (1e3, 2e3)}
        forecast = Forecast(took - 0.5, took + 0.5, kinds, {}, {})
        return dataclasses.replace(fitting, memory=fitting.memory | (of or {}), forecast=forecast, speed=speed)

    monkeypatch.setattr(plan, "compile_for", compile_one)
    config = small("instruct", rows=64, execution=execution)
    return plan.make(config, topology.find("v5e-16"), lambda text: None), seen


NAMES = "query,key,value,attention,gate,up"


@libtpu
def test_a_plan_changes_one_thing_at_a_time_and_keeps_what_is_faster(monkeypatch):
    """Of 4 rows a device: all matmuls are kept, two rows at a time, with more vector memory, without the logits.

    What comes next, if a change stays, is begun before it is known: so logits are tried with all rows at a time too.
    """
    gains = lambda e: 1.5 * (e.remat != "full") + 0.7 * (e.accumulate == 2) + 0.3 * e.scoped_vmem
    slower = lambda e: 0.2 * ("logits" in e.remat) + 0.1 * (e.accumulate == 1)
    made, seen = planned(monkeypatch, lambda e: None if e.accumulate == 1 else 9 - gains(e) + slower(e))
    ways = [(c.execution.remat, c.execution.accumulate, c.execution.scoped_vmem) for c in seen]
    logits = f"{NAMES},logits"
    path = [("full", -1, False), (NAMES, -1, False), (NAMES, 2, False), (logits, 2, False), (NAMES, 1, False),
            (logits, 1, False), (NAMES, 2, True)]  # fmt: skip
    assert sorted(ways) == sorted([*path, (logits, 2, True)])
    best = f"--config.execution.remat={NAMES} --config.execution.accumulate=2 --config.execution.scoped_vmem=True"
    assert made[0].text == best and made[0].seconds == pytest.approx(6.5)
    assert made[-1].outcome == "too large"
    text = plan_text(plan.to_dict(made))
    assert f"recommended: {best}" in text and "20.00 GB" in text and "6 ... 7  50% ... 60%" in text
    assert "28% less time than the config as it is" in text and "matmul -2.5 s, network +0 s" in text
    assert json.loads(json.dumps(plan.to_dict(made)))["best"] == best


@libtpu
@pytest.mark.parametrize("gain, is_tried", [(0.1, False), (0.7, True)])
def test_four_times_the_rows_are_tried_where_twice_as_many_save_time(monkeypatch, gain, is_tried):
    _, seen = planned(monkeypatch, lambda e: 9 - 1.5 * (e.remat != "full") - gain * (e.accumulate == 2))
    assert any(c.execution.accumulate == 1 for c in seen) == is_tried


@libtpu
def test_a_plan_never_recommends_what_is_slower_than_the_config_as_it_is(monkeypatch):
    is_default = lambda e: (e.remat, e.accumulate, e.scoped_vmem) == ("full", -1, False)
    made, seen = planned(monkeypatch, lambda e: 9.0 if is_default(e) else 10.0)
    assert len(seen) == len(made) < plan.MOST and plan.to_dict(made)["best"] == ""
    assert "recommended: the config as it is\n  10% less time" in plan_text(plan.to_dict(made))


@libtpu
def test_two_programs_are_compiled_at_once(monkeypatch):
    both = threading.Barrier(2, timeout=60)  # the config as it is, and with its matmuls kept

    def seconds(e):
        if (e.remat, e.accumulate) in (("full", -1), (NAMES, -1)) and not e.scoped_vmem:
            both.wait()
        return 9.0

    assert planned(monkeypatch, seconds)[0][0].flags == {}


@libtpu
def test_a_plan_of_what_does_not_fit_takes_less(monkeypatch):
    made, seen = planned(monkeypatch, lambda e: None, remat="dots", accumulate=1)
    ways = [("dots", 1), (NAMES, 1), ("full", -1), ("offload", -1)]
    assert sorted((c.execution.remat, c.execution.accumulate) for c in seen) == sorted(ways)
    assert plan.to_dict(made)["best"] is None and "none of these fits" in plan_text(plan.to_dict(made))
    made, seen = planned(monkeypatch, lambda e: 5.0 if e.remat == "offload" else None, remat="dots", accumulate=1)
    assert made[0].flags["execution.remat"] == "offload"
    assert "it is the only one that fits" in plan_text(plan.to_dict(made))


@libtpu
def test_a_plan_compiles_no_rows_that_surely_do_not_fit(monkeypatch):
    of = {"peak": 9e9, "temporaries": 8e9, "available": 14e9}
    made, seen = planned(monkeypatch, lambda e: 9.0, of=of)
    assert all(c.execution.accumulate == -1 for c in seen) and made[-1].outcome.startswith("not compiled")
