"""The processor: what a model is asked has the tiles and the tokens that it was trained on."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.checkpoints import load_model_config
from hovle_jax.config import EasyVQAConfig, ModelConfig
from hovle_jax.conversion.exporting import export_model
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.corpora.in_memory import SampleMaker
from hovle_jax.data.files.records import Record
from hovle_jax.data.images import decode_image
from hovle_jax.data.kinds import CONVERSATIONS
from hovle_jax.data.processor import Processor
from hovle_jax.errors import UserError
from hovle_jax.formats.tiling import tiling_from_json, tiling_to_json
from hovle_jax.inference.load import load_run
from hovle_jax.training.stages import STAGES
from hovle_jax.training.weights import save_result
from tests import broken, micro

SIZES = [(96, 64), (32, 32), (70, 20), (64, 64)]


def trained(config):
    """The processor of the model that a run leaves."""
    return Processor.of(config.model_config.only(("embedding", "llm")), micro.tokenizer())


def assert_prompt_is_of(sample, prompt):
    """The prompt is how the sample begins, up to the answer."""
    n = len(prompt.tokens)
    np.testing.assert_array_equal(sample.tokens[:n], prompt.tokens)
    assert sample.supervised[n] and not sample.supervised[:n].any()
    np.testing.assert_array_equal(sample.tiles, prompt.tiles)


@pytest.mark.parametrize("variant", ["pre", "post"])
@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "data", [{}, {"max_tiles": 4}, {"thumbnail": False}, {"min_tiles": 2, "system_message": "Speak."}, {"tiles": 4}]
)
def test_a_prompt_is_what_training_showed(variant, images, data):
    config = micro.run_config("instruct", variant, data={"sequence_length": 500, "tiles": 30} | data)
    files = tuple(broken.encoded(i, size=SIZES[i]) for i in range(images))
    question = "<image>\n" * images + "what is it?"
    reader = CONVERSATIONS.reader(config, micro.tokenizer())
    sample = reader.make(Record(files, turns=((question, "a circle"),)), np.random.default_rng(0))
    prompt = trained(config).sample([(question, None)], [decode_image(file) for file in files])
    assert_prompt_is_of(sample, prompt)
    if images and data == {"max_tiles": 4}:  # six, which four tiles make two by two, and shared ones fewer; thumbnails
        assert len(prompt.tiles) == {1: 5, 2: 4, 3: 3}[images]


def test_easy_vqa_is_trained_as_it_is_asked():
    config = micro.run_config("instruct", data={"augment": False}, easy_vqa=EasyVQAConfig(turns=1))
    example = micro.examples()[0]
    maker = SampleMaker(config, micro.tokenizer(), [example], augmented=False)
    ((question, answer),) = maker.questions(example, np.random.default_rng(0))
    sample = maker.shown(example, np.random.default_rng(0))
    prompt = trained(config).sample([(f"<image>\n{question}", None)], [example.image])
    assert_prompt_is_of(sample, prompt)
    assert len(prompt.tiles) == 1 and micro.tokenizer().decode(sample.tokens[sample.supervised]) == answer


def test_a_photo_has_the_tiles_that_internvl_gives_it():
    config = micro.run_config("instruct")
    embedding = dataclasses.replace(config.model.embedding, image_size=448, patch_size=14)
    processor = Processor.of(ModelConfig(embedding), micro.tokenizer())
    photo = Image.new("RGB", (640, 427))
    assert len(processor.cut([photo])[0]) == 7
    few = Processor.of(ModelConfig(embedding).with_max_tiles(2), micro.tokenizer())
    wide = Image.new("RGB", (896, 448))
    assert [len(tiles) for tiles in few.cut([wide])] == [3] and [len(t) for t in few.cut([wide] * 2)] == [1, 1]


def test_a_model_without_an_embedding_takes_text_alone():
    processor = Processor.of(ModelConfig(), micro.tokenizer())
    assert len(processor.sample([("hello", None)]).tokens) > 3
    with pytest.raises(UserError, match="an LLM alone and sees no images; 1 were given"):
        processor.sample([("hello", None)], [Image.new("RGB", (8, 8))])
    with pytest.raises(UserError, match="2 <image> marks and 1 image was given"):
        trained(micro.run_config("instruct")).sample([("<image><image>", None)], [Image.new("RGB", (8, 8))])


@pytest.mark.parametrize(
    "public, tiling",
    [
        ({}, (1, 12, True)),
        ({"max_dynamic_patch": 6, "use_thumbnail": False}, (1, 6, False)),
        ({"min_dynamic_patch": 2, "max_dynamic_patch": 6, "dynamic_image_size": True}, (2, 6, True)),
        ({"max_dynamic_patch": 6, "dynamic_image_size": False, "use_thumbnail": True}, (1, 1, True)),
    ],
)
def test_public_configs_say_the_tiling_and_get_it_back(public, tiling):
    read = tiling_from_json(public)
    assert tuple(read.values()) == tiling and list(read) == ["min_tiles", "max_tiles", "thumbnail"]
    config = ModelConfig(**read)
    assert tiling_from_json(tiling_to_json(config)) == read


@pytest.mark.parametrize(
    "public, message",
    [
        ({"max_dynamic_patch": 0}, "max_dynamic_patch=0 must be an integer of at least 1"),
        ({"min_dynamic_patch": 9, "max_dynamic_patch": 6}, "min_dynamic_patch=9 exceeds max_dynamic_patch=6"),
        ({"use_thumbnail": "yes"}, "use_thumbnail='yes' must be true or false"),
    ],
)
def test_public_tilings_that_cannot_be_are_refused(public, message):
    with pytest.raises(UserError, match=message):
        tiling_from_json(public)


def test_an_export_and_its_import_keep_the_tiling(tmp_path):
    config = micro.run_config("instruct", data={"tiles": 6, "max_tiles": 9, "min_tiles": 2, "thumbnail": False})
    save_result(tmp_path / "run", STAGES[config.stage], micro.params(config), config)
    micro.tokenizer().save(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "public", say=lambda line: None)
    public = json.loads((tmp_path / "public" / "config.json").read_text())
    assert (public["min_dynamic_patch"], public["max_dynamic_patch"], public["use_thumbnail"]) == (2, 6, False)
    import_checkpoint(tmp_path / "public", tmp_path / "import", say=lambda line: None)
    read = load_model_config(tmp_path / "import")
    assert (read.min_tiles, read.max_tiles, read.thumbnail) == (2, 6, False)
    assert load_run(tmp_path / "import").with_max_tiles(3).answerer.processor.tiling.max_tiles == 3
