"""What a model that answers takes of the memory, and whether that is there: known before anything is read."""

import dataclasses

import jax
import pytest

import hovle_jax
from hovle_jax.config import ModelConfig
from hovle_jax.errors import UserError
from hovle_jax.inference import answering, engine, load
from hovle_jax.inference.engine import Engine, slots_bytes
from hovle_jax.inference.memory import WORK, Budget, Weights, size
from hovle_jax.inference.slots import fused
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE
from hovle_jax.system import memory
from tests import micro
from tests.test_decode import make_answerer

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEMINFO = "MemTotal:       9000 kB\nMemAvailable:   4000 kB\n"
STAT = "anon 5\ninactive_file 1000\nactive_file 500\n"


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 4_096_000),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "9"}, 4_096_000),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "10000\n",
                "sys/fs/cgroup/memory.current": "9000\n",
                "sys/fs/cgroup/memory.stat": STAT,
            },
            2_500,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "9000\n",
            },
            0,
        ),
    ],
    ids=["unknown", "of the machine", "no limit", "of a group", "of a full group of the first version"],
)
def test_free_memory_is_that_of_the_machine_or_the_group(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.free_on_host(tmp_path) == free


def test_a_device_with_memory_of_its_own_says_what_is_free():
    def device(**stats):
        return type("Device", (), {"platform": "gpu", "memory_stats": lambda self: stats})()

    assert memory.free_on([device(bytes_limit=9, bytes_in_use=2), device(bytes_limit=9, bytes_in_use=4)]) == 5
    assert memory.free_on([device(bytes_limit=9, bytes_in_use=2), device()]) is None
    assert memory.free_on(jax.local_devices()) > 0


@pytest.mark.parametrize("dtype, int8, tied", [("bfloat16", False, True), ("float32", True, False)])
def test_the_weights_take_what_was_forecast(dtype, int8, tied):
    config = micro.run_config("instruct", tied=tied)
    hovle = HoVLE(config.model, Execution(dtype=dtype))
    sizes = ModelConfig(config.model.embedding, config.model.llm)
    params = micro.params(config)
    fuse = lambda params: fused(params, hovle, int8)
    read, made = size(params), size((jax.jit(fuse) if int8 else fuse)(params))  # one program instead of many
    forecast, kept = (Weights.of(sizes, hovle, int8, keep) for keep in (False, True))
    assert forecast.kept == made and read < forecast.reading < read + made
    assert read < kept.kept == kept.reading <= read + made


def test_the_slots_take_what_was_forecast():
    made = Engine(make_answerer("post"), slots=3, length=50, tiles=2, chunks=(8,))
    assert size(made._state) == slots_bytes(made._hovle, 3, 50, 2, 8) > slots_bytes(made._hovle, 2, 50, 2, 8)
    assert "3 answers at once of 50 tokens" in made.memory() and "of memory are left" in made.memory()


def test_the_most_that_fits_is_named():
    taken = lambda slots, length: slots * length * 1000
    budget = Budget(WORK + 1_000_000, taken, Weights(100_000, 900_000))
    assert budget.slots(9, 100) == 9 and budget.slots(None, 100) == 8 and budget.slots(None, 300) == 3
    said = (
        r"slots=10, length=100: 10 answers .* 0.00 GB of caches beside .* the most that fits is slots=9 or length=90$"
    )
    with pytest.raises(UserError, match=said):
        budget.slots(10, 100)
    with pytest.raises(UserError, match="the most that fits is length=900$"):
        budget.slots(None, 1000)
    with pytest.raises(UserError, match="fits is less than one token: use a machine with more"):
        dataclasses.replace(budget, caches=lambda slots, length: 10**7).slots(1, 10)
    with pytest.raises(UserError, match="0.00 GB while they are read: 0.27 GB of memory are free"):
        dataclasses.replace(budget, weights=Weights(1, 1_000_001)).slots(1, 10)
    with pytest.raises(UserError, match=r"GB are a second copy \(serve --noattention\)$"):
        dataclasses.replace(budget, weights=Weights(100_000, 900_000, 50_000)).slots(10, 100)
    assert Budget(None, taken).slots(None, 10**9) == 8


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    folder = micro.finished_run(tmp_path / "run")
    hovle = load.find_run(folder).models.hovle
    weights = Weights.of(load.find_run(folder).models.config, hovle).kept
    room = lambda slots: WORK + weights + slots_bytes(hovle, slots, 200)
    for module in (answering, engine):
        monkeypatch.setattr(module, "free_on", lambda devices: free)
    monkeypatch.setattr(load, "load_component", lambda *_: pytest.fail("read"))
    free = room(3)
    with pytest.raises(UserError, match=r"slots=4, length=200: .* fits is slots=3 or length=[0-9]+$"):
        hovle_jax.load(str(folder), slots=4, length=200)
    monkeypatch.undo()
    for module in (answering, engine):
        monkeypatch.setattr(module, "free_on", lambda devices: free)
    assert hovle_jax.load(str(folder), length=200).engine.num_slots == 3
    free = room(3) - weights - 1
    with pytest.raises(UserError, match="slots=3, length=200"):
        Engine(make_answerer(), 3, 200)
