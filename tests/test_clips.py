"""Public CLIPs: their numbers beside the public code's, in and out to the bit, and what of a folder makes no sense."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax.checkpoints import save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig, from_dict
from hovle_jax.conversion.exporting import LAYOUTS, export_model
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.conversion.verify import TOLERANCE, verify
from hovle_jax.errors import UserError
from hovle_jax.formats import clips
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.model import presets
from hovle_jax.model.clip import CLIP
from hovle_jax.model.execution import Execution
from hovle_jax.training.stages import STAGES
from tests import micro, shared
from tests.public_models import public_folder, random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDERS = [name for kind in ("clip-", "siglip-") for name in shared.folders(kind)]
OWN = ("clip-hf-options", "siglip-hf-options", "clip-open-options", "clip-open-custom", "clip-open-resnet-options")


@pytest.mark.parametrize("name", FOLDERS)
def test_numbers(name):
    report = verify(shared.golden(name))
    assert not report.failed(TOLERANCE), {name: report.errors.get(name) for name in report.failed(TOLERANCE)}
    assert not report.unknown
    assert {"image_embeds", "text_embeds", "logits_per_image", "loss"} <= report.errors.keys()
    assert any(name.startswith("grad.") for name in report.errors)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_export_is_the_import_to_the_bit(name, tmp_path):
    folder = shared.golden(name)
    import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    (weights,) = folder.glob("*.safetensors")
    before, after = load_file(weights), load_file(tmp_path / "public" / weights.name)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape), key
        assert after[key].tobytes() == tensor.tobytes(), key
    config = "open_clip_config.json" if "open" in name else "config.json"
    stored = json.loads((folder / config).read_text())
    written = json.loads((tmp_path / "public" / config).read_text())
    assert {key: value for key, value in written.items() if key != "torch_dtype"} == stored


@pytest.mark.parametrize("name", OWN)
def test_a_config_is_written_as_it_is_read(name):
    """Without the folder's own config.json: from our config alone."""
    config = open_checkpoint(shared.golden(name)).config
    layout = clips.layout_of(config)
    assert layout.config_from_json(layout.config_to_json(config), "config") == config
    assert from_dict(ModelConfig, json.loads(json.dumps(dataclasses.asdict(ModelConfig(clip=config))))).clip == config


REFUSED = {  # a folder, what is changed in its towers, layout -> what the line says
    "two activations": ("clip-hf-options", {}, {}, "open_clip", "quick_gelu in both towers or in none"),
    "a MAP head": (
        "siglip-hf-options", {"activation": "gelu"}, {}, "open_clip", "vision.class_token=False is not in open_clip's"
    ),
    "a ResNet": ("clip-open-resnet-options", {}, {}, "huggingface", "a ResNet has no place in Hugging Face's"),
    "the last token": ("clip-open-options", {}, {}, "huggingface", "text.pooling='last' is not in Hugging Face's"),
    "an end of 2": (
        "clip-hf-options", {}, {"end_id": 2}, "huggingface", "text.end_id=2 means in Hugging Face's CLIP that a text"
    ),
    "a mean": (
        "clip-open-options", {}, {"pooling": "highest"}, "huggingface", "vision.pooling='mean' is not in Hugging Face's"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layout_cannot_say(name):
    folder, vision, text, layout, message = REFUSED[name]
    config = open_checkpoint(shared.golden(folder)).config
    towers = {"vision": dataclasses.replace(config.vision, **vision), "text": dataclasses.replace(config.text, **text)}
    made = clips.in_layout(dataclasses.replace(config, **towers), LAYOUTS[layout])
    with pytest.raises(UserError, match=message):
        clips.layout_of(made).config_to_json(made)


def test_the_layout_of_another_model(tmp_path):
    folder = public_folder(tmp_path, "llama")
    with pytest.raises(UserError, match="--as open_clip is for a CLIP"):
        export_model(folder.parent / "ours", tmp_path / "out", layout="open_clip")


def test_both_layouts_hold_the_same_model(tmp_path):
    """A trained CLIP, exported twice: the same vectors."""
    folder = shared.golden("clip-open-options")
    config = open_checkpoint(folder).config
    text = dataclasses.replace(config.text, pooling="end", end_id=17, causal=True, layer_scale=False)
    vision = dataclasses.replace(
        config.vision, pooling="class", norm_tokens=False, pre_norm=True, layer_scale=False, activation="gelu_tanh"
    )
    config = dataclasses.replace(config, vision=vision, text=text, text_projection="linear", family="clip")
    model = ModelConfig(clip=config)
    params = jax.tree.map(lambda leaf: 0.2 * leaf, random_params(model, "clip"))
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", model, {"clip": lambda: params})
    vectors = {}
    for layout, file in (("huggingface", "model"), ("open_clip", "open_clip_model")):
        export_model(tmp_path / "ours", tmp_path / layout, layout=layout, say=lambda _: None)
        assert (tmp_path / layout / f"{file}.safetensors").is_file()
        checkpoint = open_checkpoint(tmp_path / layout)
        expected = np.load(folder / "expected.npz")
        pixels, tokens = expected["pixel_values"].transpose(0, 2, 3, 1), expected["input_ids"].astype(np.int32)
        clip = CLIP(checkpoint.config, Execution())
        vectors[layout] = jax.jit(clip.apply)({"params": checkpoint.load()}, pixels, tokens)
    for one, other in zip(*vectors.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert vectors["open_clip"][0].std() > 0.1


def test_a_folder_with_both_layouts_is_read_once(tmp_path):
    """As LAION's are, whose two files hold the same weights by other names."""
    shutil.copytree(shared.golden("clip-hf-options"), tmp_path / "both")
    for path in shared.golden("clip-open-options").glob("open_clip*"):
        shutil.copy(path, tmp_path / "both" / path.name)
    assert open_checkpoint(tmp_path / "both").config.family == "clip"
    (tmp_path / "both" / "config.json").write_text(json.dumps({"model_type": "timm_wrapper"}))
    assert open_checkpoint(tmp_path / "both").config.family == "open_clip"


def test_pixels_are_normalised_as_the_folder_says(tmp_path):
    shutil.copytree(shared.golden("clip-hf-options"), tmp_path / "clip")
    assert open_checkpoint(tmp_path / "clip").config.vision.image_mean[0] == pytest.approx(0.48145466)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    found = open_checkpoint(tmp_path / "clip").config.vision
    assert found.image_mean == (0.1, 0.2, 0.3) and found.image_std[0] == pytest.approx(0.26862954)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, "x", 0.3]}))
    with pytest.raises(UserError, match="image_mean=.* must be three numbers"):
        open_checkpoint(tmp_path / "clip")


WRONG = {  # a folder, path into its config, changes -> what the line says
    "heads": ("clip-hf-options", ("text_config",), {"num_attention_heads": 5}, "5 heads do not divide hidden_size=24"),
    "activation": ("clip-hf-options", ("vision_config",), {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    "a huge context": (
        "clip-hf-options", ("text_config",), {"max_position_embeddings": 10**9}, "context=1,000,000,000 is not possible"
    ),
    "no head": ("siglip-hf-options", ("vision_config",), {"vision_use_head": False}, "without a vector"),
    "timm": ("clip-open-options", ("model_cfg", "vision_cfg"), {"timm_model_name": "x"}, "timm_model_name='x' is not"),
    "a text tower of another library": (
        "clip-open-options", ("model_cfg", "text_cfg"), {"hf_model_name": "x"}, "hf_model_name='x' is not supported"
    ),
    "a pooling": ("clip-open-options", ("model_cfg", "vision_cfg"), {"pool_type": "none"}, "pool_type='none' is not"),
    "three stages": (
        "clip-open-resnet-options", ("model_cfg", "vision_cfg"), {"layers": [1, 1, 1]}, "must be the blocks of four"
    ),
    "an odd size": (
        "clip-open-resnet-options", ("model_cfg", "vision_cfg"), {"image_size": 70}, "must be a multiple of 32 pixels"
    ),
    "means": ("clip-open-options", ("preprocess_cfg",), {"mean": [0.5]}, "must be three numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_configs_that_make_no_sense(name, tmp_path):
    folder, path, changes, message = WRONG[name]
    shutil.copytree(shared.golden(folder), tmp_path / "clip")
    file = next((tmp_path / "clip").glob("*config.json"))
    config = json.loads(file.read_text())
    part = config
    for key in path:
        part = part[key]
    part |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "clip")


def test_references_that_make_no_sense(tmp_path):
    shutil.copytree(shared.golden("clip-hf-options"), tmp_path / "clip")
    arrays = dict(np.load(tmp_path / "clip" / "expected.npz"))
    for changes, message in (
        ({"input_ids": arrays["input_ids"][:3], "attention_mask": arrays["attention_mask"][:3]}, "make no pairs"),
        ({"input_ids": np.ones((4, 10), int), "attention_mask": np.ones((4, 10), int)}, "the context is 9"),
        ({"grad.none": np.ones(2)}, "grad.none: the checkpoint has no such tensor"),
    ):
        np.savez(tmp_path / "clip" / "expected.npz", **arrays | changes)
        with pytest.raises(UserError, match=message):
            verify(tmp_path / "clip")


def test_counters_are_whole_numbers(tmp_path):
    folder = shared.golden("clip-open-resnet-options")
    import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)
    export_model(tmp_path / "ours", tmp_path / "half", dtype="bfloat16", say=lambda _: None)
    written = load_file(tmp_path / "half" / "open_clip_model.safetensors")
    assert written["visual.bn1.num_batches_tracked"] == 1234567
    assert written["visual.bn1.weight"].dtype.itemsize == 2
    stored = load_file(folder / "open_clip_model.safetensors")
    save_file(stored | {"visual.bn1.weight": np.ones(1, np.int64)}, tmp_path / "half" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="visual.bn1.weight has the type I64"):
        open_checkpoint(tmp_path / "half")


def test_statistics_are_never_trained():
    config = ModelConfig(clip=open_checkpoint(shared.golden("clip-open-resnet-options")).config)
    stage = STAGES["contrast"]
    trains = lambda *path: stage.trains(("clip", "vision", *path), config)
    assert trains("norm1", "scale") and trains("stage1_block0", "conv1", "kernel") and trains("norm1", "bias")
    assert not any(trains("norm1", name) for name in ("mean", "variance", "batches"))


@pytest.mark.parametrize(
    "name, size",
    [("vit_b32", 151_277_313), ("vit_b16", 149_620_737), ("vit_l14", 427_616_513), ("so400m", 877_415_602)],
)
def test_published_sizes(name, size):
    config = presets.CLIPS[name]()
    config.check()
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes(ModelConfig(clip=config), "clip")))
    assert found == size  # as transformers counts them


def test_towers_that_do_not_meet():
    config = micro.clip_config()
    for changes, message in (
        ({"vision_projection": "none"}, "vision.width=32 must be projection_width=16"),
        ({"text_projection": "mlp"}, "text_projection='mlp' is not one of linear, bias, none"),
        ({"text": dataclasses.replace(config.text, pooling="mean")}, "text.pooling='mean' is not one of"),
        ({"text": dataclasses.replace(config.text, num_heads=3)}, "text: 3 heads do not divide the width 32"),
        ({"vision": dataclasses.replace(config.vision, class_token=False)}, "needs class_token=True"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes).check()
