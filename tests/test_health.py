"""The health of a run: steps that are not finite, spikes, frozen parameters, a run that stands still or collapses."""

import dataclasses
import json
import math
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hovle_jax.config import HealthConfig, OptimizerConfig
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.report.metrics import read_metrics
from hovle_jax.training import health, judging, loop, resumption, step, watchdog
from hovle_jax.training.optimizer import decay_mask, keep, learning_rate, make_optimizer
from hovle_jax.training.stages import STAGES
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 6
RUN = micro.run_config("contrast", steps=STEPS, log_every=4, checkpoint_every=1)


def quiet(line):
    pass


@jax.custom_vjp
def scaled_backwards(x, scale):
    """x; its gradient is multiplied by `scale`."""
    return x


scaled_backwards.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g * scale, jnp.zeros_like(scale)))


@pytest.fixture
def faults(monkeypatch, micro_corpus):
    """{what: {step: factor or summand}}: what the loss, the gradient, the parameters or the moments of a step, counted
    from 1, are multiplied by or get added. {'loss': {0: n}}: the run goes on from step n."""
    chosen: dict[str, dict[int, float]] = {"loss": {}, "gradient": {}, "parameter": {}, "moment": {}}
    stage = STAGES["contrast"]

    def losses(models, params, batch):
        (name, (total, weight)), *_ = stage.losses(models, params, batch).items()
        return {name: (scaled_backwards(total, batch["gradient"][0]) * batch["loss"][0], weight)}

    monkeypatch.setitem(STAGES, "contrast", dataclasses.replace(stage, losses=losses))
    before = loop.prefetched

    def prefetched(batches, placement):
        def spoilt():
            for i, (batch, *rest) in enumerate(batches, chosen["loss"].get(0, 0) + 1):
                factor = lambda name: np.full(len(batch["tokens"]), chosen[name].get(i, 1), np.float32)
                yield batch | {"loss": factor("loss"), "gradient": factor("gradient")}, *rest

        return before(spoilt(), placement)

    monkeypatch.setattr(loop, "prefetched", prefetched)
    build = loop.build

    def built(config, mesh):
        run = build(config, mesh)
        parameter, moment = (tuple(chosen[name].items()) for name in ("parameter", "moment"))
        if not parameter and not moment:
            return run  # so that its step is compiled once for all faults of the loss and the gradient
        return dataclasses.replace(run, optimizer=spoiling(run.optimizer, parameter, moment))

    monkeypatch.setattr(loop, "build", built)
    return chosen


def spoiling(optimizer, parameter, moment):
    """An optimizer whose update, or whose first moment, gets what is given for a step."""

    def update(grads, state, params, **judged):
        updates, state = optimizer.update(grads, state, params, **judged)
        count = optax.tree.get(state, "count", filtering=lambda path, _: "ScaleByAdam" in str(path))
        added = lambda pairs: sum((jnp.where(count == k, value, 0.0) for k, value in pairs), jnp.float32(0))
        if parameter:
            updates = jax.tree.map(lambda x: x + added(parameter), updates)
        if moment:
            state = optax.tree.set(state, mu=jax.tree.map(lambda x: x + added(moment), optax.tree.get(state, "mu")))
        return updates, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def changed(config=RUN, **of_health):
    return dataclasses.replace(config, health=dataclasses.replace(config.health, **of_health))


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


def slow(*values):
    """Each of these compiles a step of its own; `test_the_first_tensor_...` has them in small."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "what, value, first, named",
    [
        ("loss", math.nan, 3, "the loss is nan at step 3, the first bad step"),
        ("loss", math.inf, STEPS, f"the loss is inf at step {STEPS}, "),
        ("gradient", math.nan, STEPS, f"the gradient of clip/log_scale is not finite at step {STEPS} [(]loss "),
        slow("parameter", math.inf, 3, "clip/.* after its update is not finite at step 3 [(]loss "),
        slow("moment", math.nan, 2, "mu of clip/log_scale is not finite at step 2 [(]loss "),
    ],
)
def test_a_run_stops_at_its_first_bad_step_and_saves_nothing_of_it(tmp_path, faults, what, value, first, named):
    config = dataclasses.replace(RUN, checkpoint_every=2 if what == "parameter" else 1)
    faults[what] = {first: value, first + 1: value}
    with pytest.raises(UserError, match=f"^contrast: {named}.*lower optimizer.learning_rate"):
        loop.run(config, tmp_path, {}, say=quiet)
    assert max(saved_steps(tmp_path)) < first and not (tmp_path / "model").exists()
    faults[what] = {}
    if what == "loss" and first == 3:  # the checkpoint before is good
        faults["loss"] = {0: 2}
        assert loop.run(config, tmp_path, {}, say=quiet).finished and (tmp_path / "model").exists()


def test_a_bad_step_between_lines_is_found_before_the_save(tmp_path, faults):
    faults["gradient"] = {3: math.nan}
    config = dataclasses.replace(RUN, log_every=100, checkpoint_every=4)
    with pytest.raises(UserError, match="at step 3 "):
        loop.run(config, tmp_path, {}, say=quiet)
    assert saved_steps(tmp_path) == []


@pytest.mark.slow
def test_bad_steps_may_be_left_out_up_to_a_limit(tmp_path, faults):
    faults["loss"], faults["gradient"] = {2: math.nan}, {4: math.inf}
    said = []
    config = changed(on_bad_step="skip", max_skipped=2)
    assert loop.run(config, tmp_path / "two", {}, say=said.append).finished
    assert "contrast: step 2: the loss is not finite (loss nan); its update is left out (1 of at most 2)" in said
    rows = {row["step"]: row for row in read_metrics(tmp_path / "two")}
    assert rows[4]["skipped"] == rows[STEPS]["skipped"] == 2 and math.isfinite(rows[4]["loss"])
    with pytest.raises(UserError, match="step 4: the gradient of .* one more than the 1 that may be left out"):
        loop.run(changed(on_bad_step="skip", max_skipped=1), tmp_path / "one", {}, say=quiet)


@pytest.mark.slow
def test_an_update_that_is_not_finite_always_ends_a_run(tmp_path, faults):
    faults["parameter"] = {1: math.nan}  # no later step could mend that
    with pytest.raises(UserError, match="after its update is not finite at step 1 "):
        loop.run(changed(on_bad_step="skip"), tmp_path, {}, say=quiet)


def test_the_first_tensor_that_is_not_finite_is_found_by_its_name():
    trained = {"llm": {"head": jnp.ones((2, 2)), "norm": jnp.ones(2)}}
    opt_state = optax.adamw(1e-3).init(trained)
    names = judging.names(trained, opt_state)

    def found(loss=1.0, grads=trained, trained=trained, opt_state=opt_state):
        return names[judging.of_update(judging.of_gradients(jnp.float32(loss), grads), trained, opt_state)]

    spoilt = lambda value: {"llm": {"head": trained["llm"]["head"], "norm": jnp.array([1.0, value])}}
    moment = lambda name: optax.tree.set(opt_state, **{name: spoilt(math.inf)})
    assert found() == names[judging.FINE] == "nothing"
    assert found(math.nan, spoilt(math.nan), spoilt(math.nan)) == "the loss"
    assert found(grads=spoilt(math.nan), trained=spoilt(math.nan)) == "the gradient of llm/norm"
    assert found(grads=spoilt(1e30)) == "the gradient of llm/norm"  # its norm, by which all are clipped, overflows
    assert found(trained=spoilt(-math.inf), opt_state=moment("mu")) == "llm/norm after its update"
    assert found(opt_state=moment("mu")) == "mu of llm/norm" and found(opt_state=moment("nu")) == "nu of llm/norm"
    assert names[judging.first_of_update(trained)] == "llm/head after its update"


OPTIMIZER = OptimizerConfig()


def two_kernels(side=64):
    return {name: {"kernel": jax.random.normal(jax.random.key(i), (side, side))} for i, name in enumerate("ab")}


def test_the_optimizer_is_adamw_and_leaves_its_state_alone_where_told():
    mine = make_optimizer(OPTIMIZER, 10)
    rate = learning_rate(OPTIMIZER, 10)
    beta = {"b1": OPTIMIZER.b1, "b2": OPTIMIZER.b2, "eps": OPTIMIZER.eps}
    adamw = optax.adamw(rate, **beta, weight_decay=OPTIMIZER.weight_decay, mask=decay_mask)
    theirs = optax.chain(optax.clip_by_global_norm(OPTIMIZER.clip_norm), adamw)
    params = two_kernels(8)
    state, other = mine.init(params), theirs.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(other)  # what checkpoints are restored by
    for step_number in range(3):
        grads = jax.tree.map(lambda x: jnp.sin((step_number + 1) * x), params)
        before, (updates, state) = state, mine.update(grads, state, params)
        expected, other = theirs.update(grads, other, params)
        for mine_leaf, leaf in zip(jax.tree.leaves((updates, state)), jax.tree.leaves((expected, other)), strict=True):
            assert mine_leaf.tobytes() == leaf.tobytes()
    _, left = mine.update(jax.tree.map(lambda x: x * jnp.nan, grads), before, params, good=jnp.bool_(False))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(left), strict=True):
        assert old.tobytes() == new.tobytes()


def test_an_update_that_may_be_left_out_copies_no_moment():
    optimizer, trained = make_optimizer(OPTIMIZER, 10), two_kernels()

    def update(trained, state, grads, good):
        updates, state = optimizer.update(grads, state, trained, good=good)
        return keep(good, optax.apply_updates(trained, updates), trained), state

    given = trained, optimizer.init(trained), trained, jnp.bool_(True)
    program = jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile().as_text()
    assert "f32[64,64]" in program and not re.findall(r"f32\[64,64\]\S* copy\(", program)


def test_a_step_that_is_left_out_changes_nothing_but_the_count_and_compiles_once():
    config = changed(on_bad_step="skip", spike_sigmas=6.0)
    state, data, _ = micro.start(config)
    run = micro.run(config)
    compiled = step.train_step._cache_size()
    once = lambda state: step.train_step(state, run.placement.put_batch(data[0]), stage="contrast", run=run)
    state, _ = once(state)
    record = state.record | {"losses": jnp.full(judging.WINDOW, -5.0, jnp.float32), "taken": jnp.int32(judging.WINDOW)}
    record = {name: jax.device_put(value, state.record[name].sharding) for name, value in record.items()}
    before = jax.device_get(state)
    after, metrics = once(dataclasses.replace(state, record=record))
    assert (int(metrics["not_finite"]), int(metrics["skipped"]), int(after.step)) == (judging.FINE, 1, 2)
    kept = jax.device_get((after.trained, after.opt_state))
    for old, new in zip(jax.tree.leaves((before.trained, before.opt_state)), jax.tree.leaves(kept), strict=True):
        assert old.tobytes() == new.tobytes()
    assert int(after.record["taken"]) == judging.WINDOW  # a spike is no measure of the next one
    assert step.train_step._cache_size() == compiled + 1


def test_a_spike_is_one_of_six_sigmas_over_a_full_window():
    rng = np.random.default_rng(0)
    losses = rng.normal(2.0, 0.1, judging.WINDOW).astype(np.float32)
    record = {"losses": jnp.asarray(losses), "taken": jnp.int32(judging.WINDOW + 5), "skipped": jnp.int32(0)}
    edge = losses.mean() + 6 * losses.std()
    assert judging.is_spike(edge + 0.01, record, 6) and not judging.is_spike(edge - 0.01, record, 6)
    assert not judging.is_spike(edge + 1, record | {"taken": jnp.int32(judging.WINDOW - 1)}, 6)
    kept = judging.updated(record, jnp.float32(7), jnp.bool_(True))
    assert kept["losses"][5] == 7 and kept["taken"] == judging.WINDOW + 6 and kept["skipped"] == 0
    left = judging.updated(record, jnp.float32(7), jnp.bool_(False))
    assert np.array_equal(left["losses"], losses) and left["skipped"] == 1


@pytest.mark.slow
def test_spikes_are_left_out_alike_in_a_resumed_run(tmp_path, faults, monkeypatch):
    monkeypatch.setattr(judging, "WINDOW", 2)
    faults["loss"] = {4: 50.0, 6: 50.0}
    config = changed(spike_sigmas=6.0)
    loop.run(config, tmp_path / "whole", {}, say=quiet)
    loop.run(dataclasses.replace(config, stop_at_step=4), tmp_path / "cut", {}, say=quiet)
    faults["loss"] = {0: 4, 6: 50.0}
    loop.run(config, tmp_path / "cut", {}, say=quiet)
    records = [json.loads((tmp_path / name / health.FILE_NAME).read_text()) for name in ("whole", "cut")]
    assert records[0] == records[1] and records[0][str(STEPS)]["skipped"] >= 2  # two values make a narrow window
    # A checkpoint without a record, of a run that had no such rules, can be read all the same.
    (tmp_path / "cut" / health.FILE_NAME).unlink()
    state, _, _ = micro.start(config)
    fresh = health._restored(state.record, tmp_path / "cut", STEPS)
    assert int(fresh["skipped"]) == 0 and int(fresh["taken"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a run starts from, and what it only reads


def started(config=RUN, sources=None, say=quiet, folder=None, at=0, spoil=lambda state: state):
    state, _, _ = micro.start(config)
    made = health.Health(config, folder, sources or {}, say)
    return made, made.start(spoil(state), at)


def with_nan(part, name):
    def spoil(state):
        tree = jax.tree_util.tree_map_with_path(
            lambda path, x: x.at[(0,) * x.ndim].set(jnp.nan) if judging.name_of(path) == name else x,
            getattr(state, part),
        )
        return dataclasses.replace(state, **{part: tree})

    return spoil


def test_weights_that_are_not_finite_are_named_with_their_folder(tmp_path):
    align = micro.run_config("align")
    frozen, trained = "llm/head/kernel", "embedding/text_embedding/embedding"
    with pytest.raises(UserError, match=f"^align: {frozen} is not finite in the weights of runs/pretrain, .*init.llm"):
        started(align, {"llm": "runs/pretrain"}, spoil=with_nan("frozen", frozen))
    with pytest.raises(UserError, match=f"{trained} is not finite as it was initialised"):
        started(align, {"llm": "runs/pretrain"}, spoil=with_nan("trained", trained))
    with pytest.raises(UserError, match=f"{trained} is not finite in the checkpoint of step 4 in {tmp_path}; remove"):
        started(align, {"embedding": "runs/distill"}, folder=tmp_path, at=4, spoil=with_nan("trained", trained))


def test_a_frozen_parameter_that_changes_stops_the_run(tmp_path):
    align = micro.run_config("align")
    made, state = started(align, folder=tmp_path)
    made.before_save(1, state)
    kernel = state.frozen["llm"]["head"]["kernel"]
    state.frozen["llm"]["head"]["kernel"] = kernel.at[0, 0].set(jnp.nextafter(kernel[0, 0], 9))  # one bit
    with pytest.raises(UserError, match="the frozen parameter llm/head/kernel has changed since .* at step 2"):
        made.before_save(2, state)


def test_the_sum_of_bits_is_the_same_on_a_mesh():
    from hovle_jax.config import MeshConfig
    from hovle_jax.sharding.mesh import make_mesh

    align = micro.run_config("align")
    one, many = (micro.params(align, mesh) for mesh in (None, make_mesh(MeshConfig(data=1, fsdp=8))))
    assert health.look(one) == health.look(many)


def test_a_collapse_is_said_once(capsys):
    from hovle_jax.system import command_line

    command_line.warn.cache_clear()
    collapse = health.Collapse()
    for i in range(1, 40):
        collapse.add(i, {"loss": 2.0 + i % 2, "gradient_norm": 0.5})
    assert not capsys.readouterr().err
    for i in range(40, 40 + 3 * health.COLLAPSED):
        collapse.add(i, {"loss": 2.0794415, "gradient_norm": 0.0})
        assert bool(i >= 39 + health.COLLAPSED) == collapse._told
    (line,) = capsys.readouterr().err.splitlines()
    assert "the gradient has been exactly 0 since step 40: nothing is learned" in line


# ---------------------------------------------------------------------------------------------------------------------
# Resuming with something else


def test_other_conditions_of_a_resumed_run_are_said_or_refused(tmp_path, faults):
    half = dataclasses.replace(RUN, stop_at_step=2, checkpoint_every=2)
    loop.run(half, tmp_path, {}, say=quiet)
    wider = dataclasses.replace(half, execution=dataclasses.replace(half.execution, dtype="bfloat16"))
    with pytest.raises(UserError, match="computes in float32, not bfloat16; .*--config.execution.dtype=float32"):
        loop.run(wider, tmp_path, {}, say=quiet)
    with pytest.raises(UserError, match="stop_at_step=1 is behind step 2"):
        loop.run(dataclasses.replace(half, stop_at_step=1), tmp_path, {}, say=quiet)
    facts = json.loads((tmp_path / "facts.json").read_text())
    facts["software"]["jax"] = "0.1.0"
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    now = resumption.conditions(dataclasses.replace(half.execution, remat="dots"), HealthConfig(spike_sigmas=6.0))
    rules, software = resumption.changes(tmp_path, now)
    assert "execution.remat 'dots' (was 'none'), health.spike_sigmas 6.0 (was 0.0)" in rules
    assert f"other software: jax {jax.__version__!r} (was '0.1.0')" in software
    assert resumption.changes(tmp_path / "empty", now) == []


# ---------------------------------------------------------------------------------------------------------------------
# The watchdog


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def watched(tmp_path):
    """-> (clock, watchdog of 60 s, list to put (steps, moment) in, lines said, path of the stacks)."""
    clock, said, ended, path = Clock(), [], [(0, 0.0)], tmp_path / "stacks-0.txt"
    return clock, watchdog.Watchdog(lambda: ended[-1], 60, path, said.append, clock=clock), ended, said, path


def test_a_step_that_does_not_end_is_said_once_with_the_stacks_of_all_threads(watched):
    clock, dog, ended, said, path = watched
    clock.now = 1000
    dog.look()
    assert not said  # the first step compiles
    for i in range(1, 4):
        ended.append((i, 1000.0 + 2 * i))
        clock.now = ended[-1][1]
        dog.look()
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait, name="stuck")
    thread.start()
    for clock.now in (1060, 1067, 1200):
        dog.look()
    waiting.set()
    thread.join()
    (line,) = said
    assert line == f"no step has ended for 61 s, which usually takes 2 s; the stacks of all threads are in {path}"
    text = path.read_text()
    assert text.count("hread 0x") >= 2 and "test_a_step_that_does_not_end" in text and "in wait" in text
    ended.append((4, 1201.0))
    for clock.now in (1201, 1300):
        dog.look()
    assert len(said) == 1  # that long step is the usual one now: 10 times 195 s
    ended += [(i, 1300.0 + i) for i in range(5, 17)]
    for moment in ended[-12:]:
        clock.now = moment[1]
        ended.append(moment)
        dog.look()
    clock.now = 1400
    dog.look()
    assert len(said) == 2


def test_besides_the_steps_none_is_expected(watched):
    clock, dog, ended, said, _ = watched
    ended.append((1, 1.0))
    with dog.paused():
        clock.now = 500
        dog.look()
    clock.now = 559
    dog.look()
    assert not said
    clock.now = 561
    dog.look()
    assert len(said) == 1


def test_a_watchdog_can_end_the_run_and_needs_no_place_to_write(tmp_path):
    clock, said, ended = Clock(), [], []
    dog = watchdog.Watchdog(lambda: (1, 0.0), 60, tmp_path / "absent" / "x", said.append, ended.append, clock)
    clock.now = 61
    dog.look()
    assert "stacks cannot be written" in said[0] and ended == said


def test_a_watchdog_looks_in_a_thread_of_its_own_unless_it_has_no_time(monkeypatch, tmp_path):
    looked, dogs = threading.Event(), lambda: [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    monkeypatch.setattr(watchdog.Watchdog, "look", lambda self: looked.set())
    with watchdog.Watchdog(lambda: (0, 0.0), 0, tmp_path / "x", quiet):
        assert not dogs()
    with watchdog.Watchdog(lambda: (0, 0.0), 0.01, tmp_path / "x", quiet):
        assert looked.wait(60)
    for dog in dogs():
        dog.join(60)
    assert not dogs()


def test_the_loop_has_a_watchdog(monkeypatch, tmp_path, faults):
    made = []
    before = watchdog.Watchdog.__init__
    monkeypatch.setattr(watchdog.Watchdog, "__init__", lambda self, *given: made.append(given) or before(self, *given))
    loop.run(
        dataclasses.replace(changed(watchdog_seconds=3.5, on_hang="stop"), stop_at_step=2), tmp_path, {}, say=quiet
    )
    ((ended, seconds, path, _, stop, _),) = made
    assert (ended()[0], seconds, path) == (2, 3.5, tmp_path / "stacks-0.txt")
    monkeypatch.setattr(distributed, "end_all", lambda *given: made.append(given))
    stop("no step has ended")
    assert made[-1] == ("error: no step has ended", watchdog.STUCK)
