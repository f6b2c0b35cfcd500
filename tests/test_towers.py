"""Runs that start from trained towers: any tower teaches; a locked image tower beside a fresh text tower (LiT)."""

import dataclasses

import jax
import numpy as np
import pytest

from hovle_jax.checkpoints import load_component, save_model
from hovle_jax.components import shapes
from hovle_jax.config import InitConfig, ModelConfig
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.data.text.tokenizer import load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.model import flops
from hovle_jax.model.teacher_config import TeacherConfig
from hovle_jax.model.vit import VisionTransformer
from hovle_jax.training import checks, loop
from hovle_jax.training.adopting import with_sizes_of_sources
from hovle_jax.training.stages import STAGES
from hovle_jax.training.weights import load_teacher
from tests import micro, shared

pytestmark = pytest.mark.usefixtures("quick_compilation", "own_cache")

OURS = {"a CLIP": "clip-hf-options", "a SigLIP": "siglip-hf-options", "a ResNet": "clip-open-resnet-options"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """{kind of tower: folder of the import}."""
    root, folders = tmp_path_factory.mktemp("towers"), {}
    for number, (name, public) in enumerate(OURS.items()):
        folders[name] = root / str(number)
        import_checkpoint(shared.golden(public), folders[name], say=lambda _: None)
    return folders


def distilling(folder, **teacher):
    config = micro.run_config("distill", init=InitConfig(teacher=str(folder)))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **teacher))
    return with_sizes_of_sources(config)


@pytest.mark.parametrize("name", OURS)
def test_any_tower_teaches(name, imported):
    config = distilling(imported[name])
    checks.check(config)
    assert config.teacher.vision == open_checkpoint(shared.golden(OURS[name])).config.vision
    run = micro.run(config)
    drawn = micro.params(config) | {"teacher": load_teacher(imported[name], config, run.abstract_params()["teacher"])}
    state, batches, step = micro.start(config, drawn=drawn)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batches[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert STAGES["distill"].step_flops(config).parts["teacher"] > 0


@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_is_chosen(layer, imported):
    folder = imported["a SigLIP"]
    config = distilling(folder, layer=layer)
    run = micro.run(config)
    params = load_teacher(folder, config, run.abstract_params()["teacher"])
    tiles = np.random.default_rng(0).integers(0, 256, (2, micro.SIZE, micro.SIZE, 3), np.uint8)
    size = config.teacher.vision.image_size
    tiles = np.stack([np.resize(tile, (size, size, 3)) for tile in tiles])
    tokens = (2 * (config.teacher.vision.grid // 2) // 2) ** 2
    features = run.models["teacher"].apply({"params": params}, tiles, tokens)
    tower = VisionTransformer(config.teacher.vision, run.models.execution, layer, False)
    hidden, _ = tower.apply({"params": params["vision"]}, tiles)
    assert params["vision"]["layers"]["up"]["kernel"].shape[0] == layer
    assert features.shape == (2, tokens, 4 * config.teacher.vision.width)
    if config.teacher.vision.grid % 2 == 0:
        np.testing.assert_allclose(np.sort(features.ravel()), np.sort(np.ravel(hidden)), atol=1e-5)


def test_a_layer_that_the_tower_has_not(imported):
    with pytest.raises(UserError, match="teacher.layer=9: the tower has . layers"):
        checks.check(distilling(imported["a SigLIP"], layer=9))


def test_the_stages_of_a_resnet(imported):
    config = distilling(imported["a ResNet"], layer=3)
    assert config.teacher.width == config.teacher.vision.channels // 2
    params = load_teacher(imported["a ResNet"], config, micro.run(config).abstract_params()["teacher"])
    assert not any(name.startswith(("stage4", "pool")) for name in params["vision"])
    whole = dataclasses.replace(config.teacher, layer=0)
    assert flops.teacher(config.teacher, 4).dense < flops.teacher(whole, 4).dense


def test_a_teacher_with_a_projector_for_another_width_has_a_head(tmp_path):
    vision = micro.vision_tower(class_token=True)
    stored = ModelConfig(teacher=TeacherConfig("internvit", vision, "mlp1", 999))
    write(tmp_path, stored)
    config = micro.run_config("distill", init=InitConfig(teacher=str(tmp_path)))
    assert with_sizes_of_sources(config).teacher == TeacherConfig("internvit", vision, "linear")
    paper = dataclasses.replace(config, teacher=dataclasses.replace(stored.teacher, projector_width=32))
    with pytest.raises(UserError, match="no projector to the student's width 32; set --config.teacher.projector"):
        with_sizes_of_sources(paper)


def test_a_folder_without_a_tower(tmp_path):
    write(tmp_path, ModelConfig(llm=micro.model_config().llm))
    with pytest.raises(UserError, match="holds no tower that could teach"):
        with_sizes_of_sources(micro.run_config("distill", init=InitConfig(teacher=str(tmp_path))))


def write(folder, config):
    zeros = lambda c: jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), shapes(config, c))
    held = [c for c in ("teacher", "llm") if getattr(config, c) is not None]
    save_model(folder, config, {c: lambda c=c: zeros(c) for c in held})


def locked(folder, **changes):
    config = micro.run_config("contrast", init=InitConfig(clip=str(folder), clip_parts="vision"), steps=2)
    return dataclasses.replace(config, clip=dataclasses.replace(config.clip, frozen="vision", **changes))


def test_a_fresh_text_tower_learns_beside_a_locked_image_tower(imported, tmp_path):
    folder = imported["a SigLIP"]
    config = with_sizes_of_sources(locked(folder))
    stored = open_checkpoint(shared.golden(OURS["a SigLIP"])).config
    assert config.clip.vision == stored.vision and config.clip.text == micro.clip_config().text
    assert config.clip.loss == "softmax" and config.clip.resize == stored.resize
    result = loop.run(config, tmp_path / "run", {"clip": folder}, say=lambda line: None)
    assert result.finished
    abstract = micro.run(config).abstract_params()["clip"]
    before = load_component(folder, "clip", {"vision": abstract["vision"]})["vision"]
    after = load_component(tmp_path / "run", "clip", abstract)
    jax.tree.map(np.testing.assert_array_equal, after["vision"], before)
    assert load_tokenizer(tmp_path / "run").vocab_size <= micro.VOCAB


def test_parts_that_a_clip_has_not(imported):
    config = locked(imported["a CLIP"])
    with pytest.raises(UserError, match="init.clip_parts names eyes: use some of vision,text"):
        with_sizes_of_sources(dataclasses.replace(config, init=dataclasses.replace(config.init, clip_parts="eyes")))
    fresh = dataclasses.replace(config, init=dataclasses.replace(config.init, clip_parts="text"))
    with pytest.raises(UserError, match="clip.frozen='vision' stays as it is loaded, and vision would not be"):
        checks.check(fresh)


def test_a_public_clip_is_trained_further_with_its_own_sizes(imported):
    config = micro.run_config("contrast", init=InitConfig(clip=str(imported["a CLIP"])))
    config = dataclasses.replace(config, clip=dataclasses.replace(config.clip, patch_dropout=0.5))
    made = with_sizes_of_sources(config).clip
    stored = open_checkpoint(shared.golden(OURS["a CLIP"])).config
    assert made.vision == stored.vision and made.patch_dropout == 0.5
