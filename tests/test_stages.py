"""What each stage holds, trains and leaves alone, and how weights move from stage to stage."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from hovle_jax.checkpoints import abstract_component, is_finished, load_component
from hovle_jax.components import fresh, select
from hovle_jax.errors import UserError
from hovle_jax.training import checks
from hovle_jax.training.optimizer import make_optimizer
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import make_state
from hovle_jax.training.step import train_step
from hovle_jax.training.weights import load_params, save_result
from tests import micro
from tests.trees import host

pytestmark = pytest.mark.usefixtures("quick_compilation")

RUNS = {
    "pretrain": dict(stage="pretrain"),
    "contrast": dict(stage="contrast"),
    "distill, CLIP": dict(stage="distill"),
    "distill, InternViT, HD": dict(stage="distill", variant="post", teacher="internvit", projector="mlp1", special=9),
    "align": dict(stage="align", special=9),
    "instruct": dict(stage="instruct", variant="none"),
    "instruct, tied": dict(stage="instruct", tied=True),
}
CLASS_TOKEN = {"embedding/class_embedding", "embedding/class_position"}
TABLE = {"llm/token_embedding/embedding"}


@pytest.mark.parametrize(
    "stage, component, total",
    [
        ("pretrain", "llm", 5134.934918835337),
        ("contrast", "clip", 5204.31419060634),
        ("distill", "embedding", 4536.454189802309),
        ("distill", "head", 584.0578497992665),
    ],
)
def test_a_seed_draws_the_parameters_that_it_always_drew(stage, component, total):
    """The order in which a module makes its parameters decides what each is drawn as; runs of a seed are compared."""
    config = micro.run_config(stage)
    run = micro.run(config)
    params = fresh(run.models.config, component, config.seed, run.abstract_params()[component])
    drawn = sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(drawn, total, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "instruct, tied"])
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
    trains = lambda path: stage.trains(path, config.model_config)
    trained, frozen = set(host(select(params, trains))), set(host(select(params, lambda p: not trains(p))))
    assert trained | frozen == paths and trained
    inside = lambda *components: {p for p in paths if p.split("/")[0] in components}
    unused = CLASS_TOKEN if config.model.llm.tied else CLASS_TOKEN | TABLE  # a tied table is the head
    expected = {
        "pretrain": (inside("llm"), set()),
        "contrast": (inside("clip"), set()),
        "distill": (inside("embedding", "head") - CLASS_TOKEN, inside("teacher", "llm") | CLASS_TOKEN),
        "align": (inside("embedding") - CLASS_TOKEN, inside("llm") | CLASS_TOKEN),
        "instruct": (inside("embedding", "llm") - unused, unused),
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
    optimizer_state = make_optimizer(config.optimizer, config.steps).init(select(params, trains))
    assert set(host(optax.tree_utils.tree_get(optimizer_state, "nu"))) == trained
    elements = sum(leaf.size for leaf in jax.tree.leaves(optimizer_state) if leaf.ndim)
    scalars = 2 * ("clip/log_scale" in trained)
    assert elements + scalars == 2 * sum(leaf.size for leaf in jax.tree.leaves(select(params, trains)))


def test_fresh_parameters_depend_on_seed_and_component_alone():
    def made(config):
        abstract = micro.run(config).abstract_params()["llm"]
        return host(fresh(config.model_config, "llm", config.seed, abstract))

    align, pretrain = made(micro.run_config("align")), made(micro.run_config("pretrain"))
    other = made(micro.run_config("pretrain", seed=1))
    assert all((align[path] == leaf).all() for path, leaf in pretrain.items())
    assert (other["head/kernel"] != pretrain["head/kernel"]).any()


@pytest.fixture(scope="module")
def contrast_folder(tmp_path_factory):
    """A finished contrast run's result."""
    config, folder = micro.run_config("contrast"), tmp_path_factory.mktemp("contrast")
    save_result(folder, STAGES["contrast"], micro.params(config), config)
    return folder


def test_a_result_appears_whole(contrast_folder):
    assert is_finished(contrast_folder) and not (contrast_folder / "model.partial").exists()


def test_clips_tower_becomes_the_teacher_without_its_last_layer(contrast_folder):
    distill = micro.run_config("distill")
    got = load_params(distill, micro.run(distill), {"teacher": contrast_folder})["teacher"]["vision"]
    tower = host(micro.params(micro.run_config("contrast"))["clip"]["vision"])
    for path, leaf in host(got).items():
        wanted = tower[path][:1] if path.startswith("layers/") else tower[path]
        np.testing.assert_array_equal(leaf, wanted, err_msg=path)


def test_a_shape_that_does_not_fit_is_named(contrast_folder):
    contrast = micro.run_config("contrast")
    larger = dataclasses.replace(contrast, clip=dataclasses.replace(contrast.clip, projection_width=24))
    abstract = abstract_component(larger.model_config, "clip", micro.run(larger).placement)
    with pytest.raises(
        UserError, match=r"another config: clip/\w+_projection/kernel has shape \(32, 16\).* \(32, 24\)"
    ):
        load_component(contrast_folder, "clip", abstract)
    with pytest.raises(UserError, match="no finished 'llm' weights"):
        load_component(contrast_folder, "llm", {})


# ---------------------------------------------------------------------------------------------------------------------
# An embedding over an LLM that has no image tokens: its table ends before them


def over_a_text_only_llm(num_special_tokens=9, vocab_size=micro.VOCAB - 9):
    """A distillation whose embedding has the image tokens in a table of its own, and starts by adding nothing."""
    config = micro.run_config("distill")
    llm = dataclasses.replace(config.model.llm, vocab_size=micro.VOCAB - 9)
    embedding = dataclasses.replace(
        config.model.embedding, vocab_size=vocab_size, num_special_tokens=num_special_tokens
    )
    model = dataclasses.replace(config.model, embedding=embedding, llm=llm)
    return dataclasses.replace(config, model=model, init=dataclasses.replace(config.init, pass_through=True))


def begun(config):
    """-> (set-up, fresh parameters, first batch)."""
    run = micro.run(config)
    return run, load_params(config, run, {}), micro.dataset(config)[0]


def test_a_fresh_embedding_passes_text_on_as_the_llm_s_table_has_it():
    run, params, batch = begun(over_a_text_only_llm())
    tables = params["embedding"]["text_embedding"]["embedding"], params["llm"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(*tables)
    output, _ = jax.jit(run.models["embedding"].apply)({"params": params["embedding"]}, batch)
    text = batch["text_weights"] > 0
    np.testing.assert_array_equal(output[text], tables[1][batch["tokens"][text]])


def test_layers_that_add_nothing_are_trained_all_the_same():
    config = over_a_text_only_llm()
    run, params, batch = begun(config)
    state, metrics = train_step(make_state(STAGES["distill"], run, params), batch, stage="distill", run=run)
    assert metrics["text_cosine"] == pytest.approx(1)
    moved = host(state.trained["embedding"])["stack/layers/output/kernel"]
    assert np.isfinite(moved).all() and moved.any()


def test_a_table_of_image_tokens_has_the_tokenizer_s_size():
    config = over_a_text_only_llm()
    checks.check(config)
    checks.check_tokenizer(config, micro.tokenizer())
    with pytest.raises(UserError, match="320 ids and the model knows 314; set model.embedding.num_special_tokens=9"):
        checks.check_tokenizer(over_a_text_only_llm(num_special_tokens=3), micro.tokenizer())
    with pytest.raises(UserError, match=r"knows 303 tokens .* raise model.embedding.num_special_tokens to 11"):
        over_a_text_only_llm(num_special_tokens=3, vocab_size=300).model.check()
