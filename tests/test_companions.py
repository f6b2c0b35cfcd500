"""What lies beside the weights goes from a checkpoint to its export, or is named; what a config says to public code."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from hovle_jax.checkpoints import load_model_config
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.companions import drop_missing_code
from hovle_jax.conversion.exporting import export_model, own_dtype, public_format
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.model.presets import hovle_model
from tests.public_models import change_config, public_folder

pytestmark = pytest.mark.usefixtures("quick_compilation")
CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}


def quiet(_):
    pass


def round_trip(folder, kind=None):
    """FOLDER/public -> import -> export -> (the export's folder, lines said by each)."""
    said = {"import": [], "export": []}
    import_checkpoint(folder / "public", folder / "back", kind, say=said["import"].append)
    export_model(folder / "back", folder / "again", say=said["export"].append)
    return folder / "again", said


def test_code_and_settings_go_along_unread(tmp_path):
    folder = public_folder(tmp_path, "internvl2")
    change_config(folder, auto_map=CODE)
    change_config(folder, "llm_config", auto_map={"AutoConfig": "other/repository--configuration_y.Y"})
    carried = {
        "configuration_x.py": b"raise SystemExit('never run')\n",
        "modeling_x.py": b"\xff\x00 not even text",
        "preprocessor_config.json": b'{"size": 448}',
        "vocab.json": b"{}",
        "merges.txt": b"a b\n",
    }
    for name, data in carried.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("about it")
    (folder / ".gitattributes").write_text("")
    (folder / "runs").mkdir()
    again, said = round_trip(tmp_path)
    assert {name: (again / name).read_bytes() for name in carried} == carried
    config = json.loads((again / "config.json").read_text())
    assert config["auto_map"] == CODE
    assert "auto_map" in config["llm_config"]
    assert "left out: README.md, runs/" in said["import"]
    assert not any("lacks public code" in line for line in said["export"])


def test_code_that_is_not_there_is_not_named(tmp_path):
    folder = public_folder(tmp_path, "internvl2")
    change_config(folder, auto_map=CODE)
    (folder / "configuration_x.py").write_text("")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok_z.Slow", None]}}))
    again, said = round_trip(tmp_path)
    assert "auto_map" not in json.loads((again / "config.json").read_text())
    assert json.loads((again / "tokenizer_config.json").read_text()) == {}
    (line,) = (line for line in said["export"] if "lacks public code" in line)
    assert "modeling_x.py, tok_z.py" in line
    assert "OpenGVLab/InternVL2-2B" in line


@pytest.mark.parametrize(
    ("name", "repository"), [("hovle", "OpenGVLab/HoVLE"), ("internlm2", "internlm2-chat"), ("llama", None)]
)
def test_our_own_exports_say_what_to_copy(name, repository, tmp_path):
    folder = public_folder(tmp_path, name)
    assert "auto_map" not in (folder / "config.json").read_text()
    said = []
    drop_missing_code(folder, said.append)
    assert [repository in line for line in said] == ([True] if repository else [])


@pytest.mark.parametrize(
    ("name", "ratio"), [("hovle", 0.5), ("hovle hd, special tokens, unit output", 0.5), ("hovle, stride", 1.0)]
)
def test_what_the_config_tells_public_code(name, ratio, tmp_path):
    config = json.loads((public_folder(tmp_path, name) / "config.json").read_text())
    assert config["downsample_ratio"] == ratio
    tiling = {"dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12}
    assert config | tiling == config
    embedding, tile = config["embedding_config"], config["force_image_size"] // config["embedding_config"]["patch_size"]
    assert embedding["attn_implementation"] == "eager"
    assert embedding["max_position_embeddings"] == config["llm_config"]["max_position_embeddings"]
    # The number of image tokens that the public `chat` puts into a prompt for a tile.
    expected = load_model_config(tmp_path / "ours").embedding.tokens_per_tile
    assert int(tile**2 * config["downsample_ratio"] ** 2) == expected


def test_a_trained_model_keeps_the_dynamic_positions_of_its_llm():
    model = hovle_model()
    _, config = public_format(ModelConfig(embedding=model.embedding, llm=model.llm))
    llm = config["llm_config"]
    assert llm["rope_scaling"] == {"type": "dynamic", "factor": 2.0}  # of InternLM2-chat-1.8B
    assert llm["max_position_embeddings"] == 32768
    assert config["embedding_config"]["rope_scaling"] is None


def test_the_way_back_of_a_teacher(tmp_path):
    """Its tower is an InternViT; the projector is public beside its LLM alone, and named."""
    folder = public_folder(tmp_path, "internvl2")
    whole = load_file(folder / "model.safetensors")
    again, said = round_trip(tmp_path, "teacher")
    assert any(line.startswith("left out: mlp1") for line in said["export"])
    checkpoint = open_checkpoint(again)
    assert checkpoint.kind == "teacher"
    tower = {name: whole["vision_model." + name] for name in checkpoint.source.shapes}
    assert len(tower) == sum(name.startswith("vision_model.") for name in whole)
    for name, tensor in tower.items():
        np.testing.assert_array_equal(checkpoint.source.read(name), tensor, err_msg=name)


def test_a_tower_says_what_it_is_where_its_own_config_does_not(tmp_path):
    folder = public_folder(tmp_path, "internvl2")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    again, _ = round_trip(tmp_path, "teacher")
    assert open_checkpoint(again).config.width == 32


def test_an_import_goes_out_in_the_type_that_it_came_in(tmp_path):
    narrow = public_folder(tmp_path, "internlm2", dtype="bfloat16")
    again, _ = round_trip(tmp_path)
    assert own_dtype(tmp_path / "back") == "bfloat16"
    assert (again / "model.safetensors").read_bytes() == (narrow / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert own_dtype(tmp_path / "ours") == "float32"  # a run's own
    export_model(tmp_path / "back", tmp_path / "wide", dtype="float32", say=quiet)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "wide", narrow)]
    assert sizes[0] > 1.8 * sizes[1]
