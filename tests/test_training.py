"""Training: what each stage holds and changes, its losses, packing, meshes, resuming."""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from hovle_jax import train
from hovle_jax.config import ExecutionConfig, MeshConfig, RunConfig
from hovle_jax.data import pipeline
from hovle_jax.data.batch import BatchShape, Sample, collate
from hovle_jax.data.text import IMAGE_MARK, encode_conversation, encode_random_text
from hovle_jax.errors import UserError
from hovle_jax.model.clip import MAX_LOG_SCALE
from hovle_jax.recipes import PRESETS
from hovle_jax.report.metrics import read_metrics
from hovle_jax.training import loop
from hovle_jax.training.checkpoint import load_component
from hovle_jax.training.load import example_batch
from hovle_jax.training.losses import contrastive, cosine, cross_entropy, divide
from hovle_jax.training.optimizer import learning_rate, make_optimizer
from hovle_jax.training.sharding import check_batch_shape, make_mesh, on_mesh, put_batch
from hovle_jax.training.stages import STAGES, Models, clamp_scale, components_of
from hovle_jax.training.state import abstract_component, abstract_params, init_component, make_state, select
from hovle_jax.training.step import total_loss, train_step
from tests import micro
from tests.golden import golden

VARIANTS = ("pre", "post", "none")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Half of the time to compile; the numbers are those of the same program."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def host(tree):
    """{path: numpy array}."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def assert_close(first, second, tolerance=1e-5):
    """Two trees; the tolerance is relative to each leaf's largest value, and never under 1e-7."""
    first, second = host(first), host(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        limit = tolerance * max(np.abs(value).max(), 1e-2)
        np.testing.assert_allclose(second[name], value, rtol=0, atol=limit, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Stages

RUNS = {
    "pretrain": dict(stage="pretrain"),
    "contrast": dict(stage="contrast"),
    "distill, CLIP": dict(stage="distill"),
    "distill, InternViT, HD": dict(stage="distill", variant="post", teacher="internvit", projector="mlp1", special=9),
    "align": dict(stage="align", special=9),
    "instruct": dict(stage="instruct", variant="none"),
}
CLASS_TOKEN = {"embedding/class_embedding", "embedding/class_position"}
TABLE = {"llm/token_embedding/embedding"}


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_changes_what_it_trains_and_nothing_else(name):
    config = micro.run_config(**RUNS[name])
    state, batches, step = micro.start(config)
    trained, frozen = host(state.trained), host(state.frozen)
    assert not trained.keys() & frozen.keys()
    metrics = []
    for i in range(3):
        state, measured = step(state, batches[i])
        metrics.append(jax.device_get(measured))
    assert int(state.step) == 3
    assert all(np.isfinite(list(m.values())).all() and m["gradient_norm"] > 0 for m in metrics)
    for path, leaf in host(state.frozen).items():  # to the bit, and in spite of weight decay
        assert leaf.tobytes() == frozen[path].tobytes(), f"{path} is frozen and was changed"
    moments = host(optax.tree_utils.tree_get(state.opt_state, "mu"))
    for path, leaf in host(state.trained).items():
        assert (leaf != trained[path]).any(), f"{path} is trained and did not move"
        # A key's bias shifts all of a query's scores alike, which the softmax ignores.
        assert moments[path].any() or path.endswith("key/bias"), f"{path} gets no gradient"


@pytest.mark.parametrize("name", RUNS)
def test_what_a_stage_holds(name):
    config = micro.run_config(**RUNS[name])
    stage, params = STAGES[config.stage], micro.params(config)
    paths = set(host(params))
    trained, frozen = set(host(select(params, stage.trains))), set(host(select(params, lambda p: not stage.trains(p))))
    assert trained | frozen == paths and trained
    inside = lambda *components: {p for p in paths if p.split("/")[0] in components}
    expected = {
        "pretrain": (inside("llm"), set()),
        "contrast": (inside("clip"), set()),
        "distill": (inside("embedding", "head") - CLASS_TOKEN, inside("teacher", "llm") | CLASS_TOKEN),
        "align": (inside("embedding") - CLASS_TOKEN, inside("llm") | CLASS_TOKEN),
        "instruct": (inside("embedding", "llm") - CLASS_TOKEN - TABLE, CLASS_TOKEN | TABLE),
    }
    assert (trained, frozen) == expected[config.stage]
    assert frozen >= CLASS_TOKEN or config.stage in ("pretrain", "contrast")
    if config.stage == "distill":
        assert inside("llm") == TABLE  # neither body nor head of the LLM is ever allocated
        assert bool(inside("head")) == (config.teacher.projector == "linear")
    if "llm" in params and "embedding" in params:  # the text table starts as the LLM's token vectors
        embedding = params["embedding"]
        tables = [embedding[t]["embedding"] for t in ("text_embedding", "special_embedding") if t in embedding]
        np.testing.assert_array_equal(np.concatenate(tables), params["llm"]["token_embedding"]["embedding"])
    optimizer_state = make_optimizer(config.optimizer, config.steps).init(select(params, stage.trains))
    assert set(host(optax.tree_utils.tree_get(optimizer_state, "nu"))) == trained
    elements = sum(leaf.size for leaf in jax.tree.leaves(optimizer_state) if leaf.ndim)
    scalars = 2 * ("clip/log_scale" in trained)
    assert elements + scalars == 2 * sum(leaf.size for leaf in jax.tree.leaves(select(params, stage.trains)))


def test_fresh_parameters_depend_on_seed_and_component_alone():
    def fresh(config):
        batch, models = micro.dataset(config)[0], Models(config, config.execution)
        abstract = abstract_component(models, "llm", batch, micro.one_device())
        return host(init_component(models, "llm", batch, abstract))

    align, pretrain = fresh(micro.run_config("align")), fresh(micro.run_config("pretrain"))
    other = fresh(micro.run_config("pretrain", seed=1))
    assert all((align[path] == leaf).all() for path, leaf in pretrain.items())
    assert (other["head/kernel"] != pretrain["head/kernel"]).any()


def test_weights_move_from_stage_to_stage(tmp_path):
    """CLIP's tower becomes the teacher without its last layer; a shape that does not fit is named."""
    from hovle_jax.training.checkpoint import is_finished, save_model

    contrast, distill = micro.run_config("contrast"), micro.run_config("distill")
    save_model(tmp_path, micro.params(contrast))
    assert is_finished(tmp_path) and not (tmp_path / "model.partial").exists()
    batch, mesh, models = micro.dataset(distill)[0], micro.one_device(), Models(distill, distill.execution)
    got = loop.load_params(models, batch, mesh, {"teacher": tmp_path})["teacher"]["vision"]
    tower = micro.params(contrast)["clip"]["vision"]
    for path, leaf in host(got).items():
        wanted = host(tower)[path]
        np.testing.assert_array_equal(leaf, wanted[:1] if path.startswith("layers/") else wanted, err_msg=path)
    larger = dataclasses.replace(contrast, clip=dataclasses.replace(contrast.clip, projection_width=24))
    abstract = abstract_component(Models(larger, larger.execution), "clip", micro.dataset(larger)[0], mesh)
    with pytest.raises(
        UserError, match=r"another config: clip/\w+_projection/kernel has shape \(32, 16\).* \(32, 24\)"
    ):
        load_component(tmp_path, "clip", abstract)
    with pytest.raises(UserError, match="no finished 'llm' weights"):
        load_component(tmp_path, "llm", {})


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("case", range(5))
def test_contrastive_loss_is_that_of_open_clip(case):
    arrays = np.load(golden("contrastive-loss") / "expected.npz")
    get = lambda name: arrays[f"case{case}.{name}"]

    def loss(images, texts, log_scale):
        return divide(contrastive(images, texts, log_scale))

    inputs = [get(n) for n in ("image_features", "text_features", "log_logit_scale")]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*inputs)
    np.testing.assert_allclose(value, get("clip.loss"), rtol=1e-5, atol=1e-6)
    for name, gradient in zip(("grad_image", "grad_text", "grad_log_logit_scale"), gradients):
        np.testing.assert_allclose(gradient, get(f"clip.{name}"), rtol=1e-4, atol=2e-6, err_msg=name)


def test_the_logit_scale_is_clamped_at_100():
    clamped = clamp_scale({"clip": {"log_scale": jnp.float32(5.0), "other": 1}})["clip"]
    assert float(clamped["log_scale"]) == pytest.approx(np.log(100)) and clamped["other"] == 1
    assert float(clamp_scale({"clip": {"log_scale": jnp.float32(1.5)}})["clip"]["log_scale"]) == 1.5
    config = micro.run_config("contrast")
    state, batches, step = micro.start(config)
    state.trained["clip"]["log_scale"] = jnp.float32(
        9.0
    )  # a start above the limit, which one step alone would not mend
    state, _ = step(state, batches[0])
    assert float(state.trained["clip"]["log_scale"]) == pytest.approx(MAX_LOG_SCALE)


def test_cosine():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 7)).astype(np.float32)
    weights = np.asarray([1, 0, 2, 1, 0.5], np.float32)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    total, weight = cosine(x, y, weights)
    np.testing.assert_allclose(total, -(weights * cosines).sum(), rtol=1e-5)
    assert float(weight) == 4.5
    gradient = jax.grad(lambda x: cosine(x, y, weights)[0])(x)
    assert not gradient[1].any() and np.abs((gradient * x).sum(-1)).max() < 1e-5  # of length it knows nothing


@pytest.mark.parametrize("zero", ["prediction", "target", "both"])
def test_cosine_is_finite_at_zero_vectors(zero):
    x, y = jnp.ones((2, 4)), jnp.ones((2, 4))
    x = x.at[0].set(0) if zero != "target" else x
    y = y.at[0].set(0) if zero != "prediction" else y
    value, gradients = jax.value_and_grad(lambda x, y: cosine(x, y, jnp.ones(2))[0], argnums=(0, 1))(x, y)
    assert float(value) == pytest.approx(-1) and all(np.isfinite(g).all() for g in gradients)


def test_cross_entropy_counts_weighted_tokens_alone():
    logits = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    total, weight = cross_entropy(logits, np.asarray([[2, 4, 0]]), np.asarray([[1.0, 0.5, 0.0]]))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(total, -log_p[0, 0, 2] - 0.5 * log_p[0, 1, 4], rtol=1e-5)
    assert float(weight) == 1.5
    gradient = jax.grad(lambda pair: divide((pair, jnp.float32(0))))(jnp.float32(3))
    assert float(divide((total, jnp.float32(0)))) == 0 and float(gradient) == 0


def test_learning_rate_schedule():
    config = dataclasses.replace(
        micro.run_config("align").optimizer, learning_rate=2.0, warmup_steps=4, final_fraction=0.1
    )
    values = [float(learning_rate(config, 12)(i)) for i in range(13)]
    np.testing.assert_allclose(values[:5], [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose([values[8], values[12]], [0.2 + 0.9, 0.2], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def conversations(config):
    """Six samples of different lengths; the second and the last have no picture."""
    turns = [("what shape?", "circle"), ("hello, what is it?", "red"), ("describe the picture.", "a red circle")] * 2
    samples = []
    for i, (turn, picture) in enumerate(zip(turns, micro.pictures())):
        shown = i not in (1, 5)
        tiles = picture.image[None] if shown else np.zeros((0, *picture.image.shape), np.uint8)
        text = f"{IMAGE_MARK}\n{turn[0]}" if shown else turn[0]
        encoded = encode_conversation(
            micro.tokenizer(), [(text, turn[1])], "s", (1,) * shown, config.model.embedding.tokens_per_tile
        )
        samples.append(Sample(encoded.tokens, encoded.supervised, tiles))
    return samples


def random_texts(config):
    """Six samples of distillation, with different numbers of random ids."""
    samples, rng = [], np.random.default_rng(0)
    for count, picture in zip((3, 1, 5, 2, 4, 6), micro.pictures()):
        encoded = encode_random_text(micro.tokenizer(), rng, count, "s", (1,), config.model.embedding.tokens_per_tile)
        samples.append(Sample(encoded.tokens, encoded.supervised, picture.image[None]))
    return samples


@pytest.mark.parametrize("stage, variant", [*itertools.product(["instruct"], VARIANTS), ("distill", "post")])
def test_packed_rows_give_the_loss_and_gradients_of_rows_of_their_own(stage, variant):
    config = micro.run_config(stage, variant)
    models = Models(config, config.execution)
    kind = pipeline.RECIPES[stage].kind
    samples = (conversations if stage == "instruct" else random_texts)(config)
    longest = max(len(s.tokens) for s in samples)

    @jax.jit
    def losses(params, batch):
        def total(params):
            pairs = STAGES[stage].losses(models, params, batch)
            return sum(pair[0] for pair in pairs.values()), pairs

        return jax.grad(total, has_aux=True)(params)

    results = []
    for per_row in (1, 3):
        data = dataclasses.replace(config.data, sequence_length=per_row * longest, tiles=per_row)
        shape = BatchShape.of(data, config.model.embedding, micro.tokenizer().image_id)
        batch = collate(samples, shape, kind, per_row)
        assert len(batch["tokens"]) == 6 // per_row
        results.append(losses(micro.params(config), batch))
    (grads, pairs), (packed_grads, packed_pairs) = results
    for name, (total, weight) in pairs.items():
        assert float(weight) == float(packed_pairs[name][1]) > 0
        np.testing.assert_allclose(packed_pairs[name][0], total, rtol=1e-5)
    assert_close(grads, packed_grads)


# ---------------------------------------------------------------------------------------------------------------------
# Execution: layers written out or looped over, recomputed or not, on any mesh


def gradients_of(models, stage):
    def of(params, batch):
        trained = select(params, STAGES[stage].trains)
        frozen = select(params, lambda path: not STAGES[stage].trains(path))
        (loss, _), grads = jax.value_and_grad(total_loss, has_aux=True)(trained, frozen, batch, stage, models)
        return loss, grads

    return jax.jit(of)


@functools.cache
def reference(config):
    """(loss, gradients) on one device."""
    batch = micro.dataset(config)[0]
    return jax.device_get(gradients_of(Models(config, config.execution), config.stage)(micro.params(config), batch))


@pytest.mark.parametrize(
    "execution", [ExecutionConfig(unroll_layers=True), ExecutionConfig(remat="full"), ExecutionConfig(remat="dots")]
)
def test_execution_changes_neither_parameters_nor_numbers(execution):
    config = micro.run_config("instruct")
    models = Models(config, execution)
    batch, mesh = micro.dataset(config)[0], micro.one_device()
    assert jax.tree.map(jnp.shape, micro.params(config)) == jax.tree.map(
        jnp.shape, abstract_params(models, batch, mesh)
    )
    loss, grads = gradients_of(models, config.stage)(micro.params(config), batch)
    np.testing.assert_allclose(loss, reference(config)[0], rtol=1e-5)
    assert_close(reference(config)[1], grads)


MESHES = {
    "data=8": MeshConfig(data=8),
    "data=2,fsdp=4": MeshConfig(data=2, fsdp=4),
    "data=2,fsdp=2,tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data=4,sequence=2": MeshConfig(data=4, sequence=2),
}
SHARDED = [*itertools.product(["instruct", "distill"], MESHES), ("contrast", "data=8")]


@pytest.mark.parametrize("stage, mesh_name", SHARDED)
def test_a_mesh_changes_no_number(stage, mesh_name):
    config = micro.run_config(stage)
    models, mesh, batch = Models(config, config.execution), make_mesh(MESHES[mesh_name]), micro.dataset(config)[0]
    assert mesh.size == 8
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(models, batch, mesh))
    params = jax.device_put(micro.params(config), shardings)
    with on_mesh(mesh):
        loss, grads = gradients_of(models, stage)(params, put_batch(batch, mesh))
    np.testing.assert_allclose(loss, reference(config)[0], rtol=1e-5)
    assert_close(reference(config)[1], grads)


def test_parameters_moments_and_rows_are_really_cut():
    config, mesh = micro.run_config("instruct"), make_mesh(MESHES["data=2,fsdp=2,tensor=2"])
    models, batch = Models(config, config.execution), micro.dataset(config)[0]
    optimizer, params = make_optimizer(config.optimizer, config.steps), micro.params(config)
    with on_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(models, batch, mesh))
        state = make_state(models, jax.device_put(params, shardings), optimizer)
        kernels = lambda tree: tree["llm"]["stack"]["layers"]["gate"]["kernel"]

        def check(state):
            for tree in (state.trained, *(optax.tree_utils.tree_get(state.opt_state, m) for m in ("mu", "nu"))):
                assert kernels(tree).sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
                assert kernels(tree).addressable_shards[0].data.shape == (2, 16, 32)

        check(state)
        compiled = train_step._cache_size()
        rows = put_batch(batch, mesh)
        assert rows["tokens"].addressable_shards[0].data.shape == (2, config.data.sequence_length)
        for _ in range(2):
            state, _ = train_step(state, rows, stage=config.stage, models=models, optimizer=optimizer)
            check(state)
        assert train_step._cache_size() == compiled + 1  # once, not again for where the first step left its results


def test_logical_constraints_reach_the_program():
    config, mesh = micro.run_config("instruct"), make_mesh(MESHES["data=4,sequence=2"])
    models, batch, params = Models(config, config.execution), micro.dataset(config)[0], micro.params(config)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    program = lambda: jax.jit(lambda p, b: models.hovle.logits(p, b)).trace(params, batch)
    with on_mesh(mesh):
        traced = program()
    text = traced.lower().as_text()
    # Before and behind each of the two stacks: [B, L, D], rows over the data axes and L over `sequence`.
    assert text.count("sharding_constraint") == 4 == str(traced.jaxpr).count("sharding_constraint[")
    assert text.count('<@mesh, [{"data", "fsdp"}, {"sequence"}, {}]>') >= 4
    with mesh:  # the usual way, in which they would silently be ignored
        assert "sharding_constraint" not in str(program().jaxpr)


def test_meshes_and_batches_that_do_not_divide_fail_with_the_number():
    with pytest.raises(UserError, match="data=3, .* does not cover 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match="data.batch_size=30 must divide by 8 devices .*: use 32"):
        check_batch_shape(30, 64, make_mesh(MeshConfig()))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture
def micro_corpus(monkeypatch):
    monkeypatch.setattr(pipeline, "load_pictures", lambda config, split: list(micro.pictures()))


# The stage that compiles fastest.
LOOP = micro.run_config("contrast", steps=4, log_every=1, checkpoint_every=3, execution=ExecutionConfig(dtype="auto"))


def saved(folder, step):
    """Everything in a checkpoint, and the finished model: {path: array}."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "checkpoints" / str(step) / "default")
        model = {c: checkpointer.restore(folder / "model" / c) for c in ("clip",)}
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "model": model})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def quiet(line):
    pass


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, micro_corpus):
    whole, cut, killed = (tmp_path / name for name in ("whole", "cut", "killed"))
    result = loop.run(LOOP, whole, {}, say=quiet)
    assert (result.step, result.finished) == (4, True)
    stopped = loop.run(dataclasses.replace(LOOP, stop_at_step=2), cut, {}, say=quiet)
    assert (stopped.step, stopped.finished) == (2, False) and not (cut / "model").exists()
    said = []
    assert loop.run(LOOP, cut, {}, say=said.append).finished
    assert "contrast: resuming at step 2" in said
    # Killed behind step 4 without a checkpoint of it: what was written after step 3 happens again.
    import shutil

    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    shutil.rmtree(killed / "model")
    said.clear()
    assert loop.run(LOOP, killed, {}, say=said.append).finished
    assert "contrast: resuming at step 3" in said
    expected = saved(whole, 4)
    assert len(expected) > 100 and int(expected["['state']['step']"]) == 4
    for folder in (cut, killed):
        got = saved(folder, 4)
        assert got.keys() == expected.keys()
        for path, leaf in expected.items():
            assert leaf.tobytes() == got[path].tobytes(), f"{folder.name}: {path}"
        assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
        assert [row["loss"] for row in read_metrics(folder)] == [row["loss"] for row in read_metrics(whole)]
    for name in ("config.json", "tokenizer.model", "first_batch.png"):
        assert (whole / name).stat().st_size > 0
    # Another seed in the same folder would mix two runs.
    with pytest.raises(UserError, match="holds a run with seed=0, not 7; choose another --workdir"):
        loop.run(dataclasses.replace(LOOP, seed=7), whole, {}, say=quiet)
    changed = dataclasses.replace(LOOP, optimizer=dataclasses.replace(LOOP.optimizer, learning_rate=1e-4, b1=0.5))
    with pytest.raises(UserError, match=r"optimizer.b1=0.9, not 0.5 \(and 1 more keys\)"):
        loop.run(changed, whole, {}, say=quiet)


def test_the_held_out_loss_is_written_at_its_steps(tmp_path, micro_corpus):
    config = micro.run_config("distill", steps=3, log_every=3, eval_every=2)
    result = loop.run(config, tmp_path, {}, say=quiet)
    assert list(result.held_out) == [0, 2, 3]
    losses = {step: metrics["loss"] for step, metrics in result.held_out.items()}
    assert losses[3] < losses[0]
    for metrics in result.held_out.values():
        assert metrics["loss"] == pytest.approx(-metrics["image_cosine"] - metrics["text_cosine"], abs=1e-5)
    written = {row["step"]: row.get("held_out/loss") for row in read_metrics(tmp_path)}
    assert written == pytest.approx(losses)
    assert not (tmp_path / "model" / "llm").exists() or set(path.name for path in (tmp_path / "model").iterdir()) <= {
        "embedding",
        "llm",
    }


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, micro_corpus):
    optimizer = dataclasses.replace(LOOP.optimizer, learning_rate=float("inf"))
    config = dataclasses.replace(LOOP, optimizer=optimizer)
    with pytest.raises(UserError, match="the loss is nan at step 2 .* lower optimizer.learning_rate"):
        loop.run(config, tmp_path, {}, say=quiet)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Configs

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STAGE_FILES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def test_each_stage_has_a_config_file():
    assert set(STAGE_FILES) == set(STAGES)


@pytest.mark.parametrize("stage, preset", [*itertools.product(STAGE_FILES, PRESETS)])
def test_each_config_resolves(stage, preset):
    if preset.startswith("hovle") and stage in ("pretrain", "contrast"):
        with pytest.raises(UserError, match=f"'{preset}' has no {stage} stage"):
            train.stage_config(CONFIGS, stage, preset)
        return
    config = train.stage_config(CONFIGS, stage, preset)
    assert (config.stage, config.preset) == (stage, preset)
    if preset.startswith("hovle"):
        with pytest.raises(UserError, match="--config.tokenizer.path=FILE"):
            loop.check(config)
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path="llm.model"))
    loop.check(config)
    assert RunConfig.from_dict(config.to_dict()) == config
    if preset.startswith("tiny"):
        make_mesh(config.mesh)
        check_batch_shape(config.data.batch_size, config.data.sequence_length, make_mesh(config.mesh))


def test_unknown_presets_and_keys_are_named():
    with pytest.raises(UserError, match="unknown preset 'huge'; use one of tiny, "):
        train.stage_config(CONFIGS, "align", "huge")
    mapping = micro.run_config("align").to_dict()
    mapping["optimizer"]["learning_rat"] = mapping["optimizer"].pop("learning_rate")
    with pytest.raises(UserError, match="config.optimizer.learning_rat is not a known key; did you mean learning_rate"):
        RunConfig.from_dict(mapping)
    with pytest.raises(UserError, match="config.steps='many' should be of type int"):
        RunConfig.from_dict(micro.run_config("align").to_dict() | {"steps": "many"})


@pytest.mark.parametrize("preset", ["hovle", "hovle_hd"])
def test_full_size_state_in_abstract(preset):
    """Every stage of the paper's recipe: what is allocated, trained and frozen."""
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    totals = {}
    for stage in ("distill", "align", "instruct"):
        config = train.stage_config(CONFIGS, stage, preset)
        mesh = make_mesh(config.mesh)
        assert mesh.shape["fsdp"] == 8
        models = Models(config, ExecutionConfig())
        params = abstract_params(models, example_batch(config), mesh)
        assert params.keys() == set(components_of(config))
        totals[stage] = (count(params), count(select(params, STAGES[stage].trains)))
        largest = params["embedding"]["stack"]["layers"]["gate"]["kernel"]
        assert largest.sharding.shard_shape(largest.shape) == (8, 256, 8192)
    whole, table, class_token = 2_606_327_808, 92553 * 2048, 2 * 2048
    assert totals["align"][0] == totals["instruct"][0] == whole
    assert totals["instruct"][1] == whole - table - class_token
    assert totals["distill"][1] == totals["align"][1] == count(params["embedding"]) - class_token
