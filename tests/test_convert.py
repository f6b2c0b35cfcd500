"""Public checkpoints in and out: round trips to the bit, and configs as public code reads them."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hovle_jax.checkpoints import abstract_component, load_component, load_model_config, save_model
from hovle_jax.components import shapes as shapes_of
from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.conversion.downloads import model_folder
from hovle_jax.conversion.exporting import DTYPES, export_model, make_index, public_format
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.errors import UserError
from hovle_jax.formats import llms
from hovle_jax.formats.families import local_path, open_checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.config import RopeScaling
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.presets import hovle_model
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.training.losses.tokens import cross_entropy, divide
from tests import micro
from tests.public_models import MODELS, change_checkpoint, components_of, llm, made, public_folder
from tests.test_commands import command
from tests.trees import host

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    config = MODELS[name]
    params = made(tmp_path / "ours", config)
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    assert open_checkpoint(tmp_path / "public").components() == {
        component: getattr(config, component) for component in components_of(config)
    }
    import_checkpoint(tmp_path / "public", tmp_path / "back", say=lambda _: None)
    back = load_model_config(tmp_path / "back")
    assert all(getattr(back, component) == getattr(config, component) for component in components_of(config))
    export_model(tmp_path / "back", tmp_path / "again", say=lambda _: None)
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("public", "again"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(second[key], tensor, err_msg=key)
    checkpoint = open_checkpoint(tmp_path / "public")
    for component, expected in params.items():
        expected, found = host(expected), host(checkpoint.load_component(component))
        assert expected.keys() == found.keys()
        for key, leaf in expected.items():
            np.testing.assert_array_equal(found[key], leaf, err_msg=key)


def test_parts_bfloat16_and_what_the_config_says(tmp_path):
    made(tmp_path / "ours", MODELS["internvl2"])
    export_model(tmp_path / "ours", tmp_path / "public", dtype="bfloat16", say=lambda _: None)
    path = tmp_path / "public" / "config.json"
    public = json.loads(path.read_text())
    assert public["torch_dtype"] == "bfloat16"
    path.write_text(json.dumps(public | {"max_dynamic_patch": 12, "llm_config": public["llm_config"] | {"extra": 1}}))
    import_checkpoint(tmp_path / "public", tmp_path / "teacher", "teacher", say=lambda _: None)
    assert components_of(load_model_config(tmp_path / "teacher")) == ["teacher"]
    assert not (tmp_path / "teacher" / "model" / "llm").exists()
    with pytest.raises(UserError, match="has no embedding; it has teacher and llm"):
        import_checkpoint(tmp_path / "public", tmp_path / "hovle", "hovle")
    # A second trip loses nothing: bfloat16 is exact in float32, and unknown keys of config.json are kept.
    import_checkpoint(tmp_path / "public", tmp_path / "both", say=lambda _: None)
    export_model(tmp_path / "both", tmp_path / "again", dtype="bfloat16", say=lambda _: None)
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("public", "again")]
    assert files[0] == files[1]
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["max_dynamic_patch"] == 12
    assert again["llm_config"]["extra"] == 1
    with pytest.raises(UserError, match="exists and is not empty"):
        import_checkpoint(tmp_path / "public", tmp_path / "both")
    with pytest.raises(UserError, match="exists"):
        export_model(tmp_path / "both", tmp_path / "again")


def test_shards_and_their_index(tmp_path):
    config = MODELS["hovle"]
    made(tmp_path / "ours", config)
    export_model(tmp_path / "ours", tmp_path / "public", shard_bytes=60_000, say=lambda _: None)
    index = json.loads((tmp_path / "public" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "public").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    stored = {file: load_file(tmp_path / "public" / file) for file in files}
    assert {name: file for file, tensors in stored.items() for name in tensors} == index["weight_map"]
    nbytes = {file: sum(x.nbytes for x in tensors.values()) for file, tensors in stored.items()}
    assert sum(nbytes.values()) == index["metadata"]["total_size"]
    assert all(size <= 60_000 or len(stored[file]) == 1 for file, size in nbytes.items())
    import_checkpoint(tmp_path / "public", tmp_path / "back", say=lambda _: None)
    (tmp_path / "public" / files[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[1]}, which .* names"):
        open_checkpoint(tmp_path / "public")


def test_total_size_of_the_published_checkpoint():
    model = hovle_model()
    config = ModelConfig(embedding=model.embedding, llm=model.llm)
    rules, _ = public_format(config)
    params = {component: shapes_of(config, component) for component in ("embedding", "llm")}
    shapes = {name: x.shape for name, x in jax.eval_shape(lambda p: to_public(rules, p), params).items()}
    index = make_index(shapes, DTYPES["float32"])
    assert index["metadata"]["total_size"] == 10_425_311_232
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_onto_a_mesh(tmp_path):
    config = MODELS["hovle"]
    params = made(tmp_path / "ours", config)
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    placement = Placement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    for component, expected in params.items():
        abstract = abstract_component(config, component, placement)
        loaded = open_checkpoint(tmp_path / "public").load_component(component, abstract)
        assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == jax.tree.map(lambda leaf: leaf.sharding, abstract)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded))
        for key, leaf in host(expected).items():
            np.testing.assert_array_equal(host(loaded)[key], leaf, err_msg=key)


def test_a_tied_head_that_is_stored(tmp_path):
    """A copy is written again; one that differs is a head of its own, as transformers reads it."""
    made(tmp_path / "ours", ModelConfig(llm=llm("llama", tied=True)))
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    table = load_file(tmp_path / "public" / "model.safetensors")["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}  # of old checkpoints: ignored
    change_checkpoint(tmp_path / "public", **{"lm_head.weight": table}, **buffers)
    assert open_checkpoint(tmp_path / "public").config.tied
    import_checkpoint(tmp_path / "public", tmp_path / "back", say=lambda _: None)
    export_model(tmp_path / "back", tmp_path / "again", say=lambda _: None)
    again = load_file(tmp_path / "again" / "model.safetensors")
    np.testing.assert_array_equal(again["lm_head.weight"], table)
    change_checkpoint(tmp_path / "public", **{"lm_head.weight": table + 1})
    assert not open_checkpoint(tmp_path / "public").config.tied
    head = open_checkpoint(tmp_path / "public").load()["head"]["kernel"]
    np.testing.assert_array_equal(head.T, table + 1)


YARN_KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {  # keys of config.json -> what transformers makes of them
    "theta beside parameters": ({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}, (500.0, None)),
    "theta in parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, (300.0, None)),
    "scaling replaces parameters": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0}},
        (10000.0, RopeScaling("linear", 2.0, 64)),
    ),
    "yarn, mscale": (
        {"rope_scaling": YARN_KEYS | {"mscale": 2.0, "mscale_all_dim": 1.0, "truncate": False}},
        (10000.0, RopeScaling("yarn", 4.0, 16, attention_factor=1.27725887 / 1.13862944, truncate=False)),
    ),
    "yarn, no factor": ({"rope_scaling": YARN_KEYS | {"factor": None}}, (10000.0, RopeScaling("yarn", 4.0, 16))),
    "yarn, mscale alone": ({"rope_scaling": YARN_KEYS | {"mscale": 2.0}}, (10000.0, RopeScaling("yarn", 4.0, 16))),
    "llama3, no original": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
        (10000.0, RopeScaling("llama3", 8.0, 64)),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_keys(name):
    keys, (theta, scaling) = ROPES[name]
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=40)
    config = {"model_type": "llama", "max_position_embeddings": 64, **sizes, **keys}
    stack = llms.config_from_json(config).stack
    assert stack.rope_theta == theta
    if scaling is not None:
        scaling = dataclasses.replace(scaling, attention_factor=pytest.approx(scaling.attention_factor))
    assert stack.rope_scaling == scaling


def test_sliding_windows():
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, intermediate_size=48, vocab_size=40)
    config = {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, **sizes}
    for idle in ({"max_window_layers": 4}, {"sliding_window": None}, {"layer_types": ["full_attention"] * 4}):
        llms.config_from_json(config | idle)
    for working in ({"max_window_layers": 3}, {"layer_types": ["full_attention", "sliding_attention"] * 2}):
        with pytest.raises(UserError, match="use_sliding_window=True is not supported"):
            llms.config_from_json(config | working)


def test_a_hub_id(tmp_path, monkeypatch):
    public, asked = public_folder(tmp_path, "internlm2"), []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(public)

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    import_checkpoint("hf:some/model", tmp_path / "dst", say=lambda _: None)
    assert load_model_config(tmp_path / "dst").llm.family == "internlm2"
    assert local_path("hf:some/model@v1.0") == local_path("hf:some/model@refs/pr/1") == public
    assert asked == [("some/model", None), ("some/model", "v1.0"), ("some/model", "refs/pr/1")]

    def offline(*_, **__):
        raise RuntimeError("no route to the hub")  # its errors are of many classes

    hub.snapshot_download = offline
    with pytest.raises(UserError, match=r"hf:some/other cannot be downloaded .*no route"):
        import_checkpoint("hf:some/other", tmp_path / "dst2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        import_checkpoint("hf:some/other", tmp_path / "dst2")


@pytest.mark.parametrize("name", ["runs/instrct", "some/model", "some/model@v1"])
def test_what_is_mistyped_is_not_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no folder {name}; if it is a model of the hub, give hf:{name}$"):
        import_checkpoint(name, tmp_path / "dst")
    with pytest.raises(UserError, match=f"there is no folder {name}"):
        model_folder(name)


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:../model", "hf:a/b/c", "hf:a/b@", "hf:a b/c", "hf:a/b@v 1"])
def test_what_is_no_hub_id(name):
    with pytest.raises(UserError, match="is not a hub id: give hf:ORG/NAME"):
        model_folder(name)


def test_a_public_checkpoint_is_imported_on_the_way(tmp_path, monkeypatch):
    public, said = public_folder(tmp_path, "internlm2"), []
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    first = model_folder(str(public), say=said.append)
    assert load_model_config(first).llm.family == "internlm2" and first.is_relative_to(tmp_path / "cache" / "models")
    assert said == [f"{public} is a public checkpoint: importing it once into {first}"]
    hub = types.SimpleNamespace(snapshot_download=lambda name, **_: {"some/model": str(public)}[name])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert model_folder(str(public), say=said.append) == first and len(said) == 1
    assert load_model_config(model_folder("hf:some/model", say=said.append)).llm == load_model_config(first).llm
    os.utime(public / "config.json", (1, 1))  # as if it had been downloaded again
    assert model_folder(str(public), say=said.append) != first
    assert len(said) == 3 and said[1].startswith("hf:some/model is a public checkpoint")
    assert model_folder(str(first), say=said.append) == first and len(said) == 3


def test_usage():
    for arguments in ((), ("compress",), ("import", "a")):
        result: subprocess.CompletedProcess = command("convert", *arguments)
        assert result.returncode == 2
        assert "import SRC DST" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies that are padded for a mesh.


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_padded_vocabulary_changes_nothing(tied, tmp_path):
    plain = micro.model_config("pre", special=9, tied=tied)
    padded = dataclasses.replace(
        plain,
        embedding=dataclasses.replace(plain.embedding, vocab_multiple=128),
        llm=dataclasses.replace(plain.llm, vocab_multiple=128, family="llama"),
    )
    assert (padded.llm.table_rows, padded.embedding.table_rows) == (384, 384)
    made(tmp_path / "plain", ModelConfig(plain.embedding, dataclasses.replace(plain.llm, family="llama")))
    config, placement = micro.run_config("align", special=9), Placement(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    batch, results = micro.dataset(config)[0], []
    params = {}
    for name, model in (("plain", plain), ("padded", padded)):
        sizes = ModelConfig(model.embedding, model.llm)
        abstract = {c: abstract_component(sizes, c, placement) for c in ("embedding", "llm")}
        params[name] = {c: load_component(tmp_path / "plain", c, abstract[c]) for c in abstract}
        run = HoVLE(model)

        def loss(params, run=run):
            logits = run.logits(params, batch)
            return divide(cross_entropy(logits, batch["targets"], batch["loss_weights"])), logits

        (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params[name])
        results.append((logits, value, gradients))
    table = params["padded"]["llm"]["token_embedding"]["embedding"]
    assert table.sharding.shard_shape(table.shape)[0] == 96
    (logits, loss, gradients), (padded_logits, padded_loss, padded_gradients) = results
    np.testing.assert_allclose(padded_logits[..., : micro.VOCAB], logits, atol=1e-5)
    assert padded_logits[..., micro.VOCAB :].max() < -1e29
    assert float(padded_loss) == pytest.approx(float(loss), rel=1e-6)
    expected = host(gradients)
    for path, gradient in host(padded_gradients).items():
        gradient, scale = gradient[tuple(map(slice, expected[path].shape))], np.abs(expected[path]).max()
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5 * max(1, scale), err_msg=path)
        assert np.abs(gradient).sum() == pytest.approx(np.abs(expected[path]).sum(), rel=1e-3, abs=1e-6), path

    # Exported without the padding; what is stored with it also loads without it.
    (tmp_path / "padded").mkdir()
    save_model(
        tmp_path / "padded",
        ModelConfig(padded.embedding, padded.llm),
        {c: lambda c=c: params["padded"][c] for c in params["padded"]},
    )
    for name in ("plain", "padded"):
        export_model(tmp_path / name, tmp_path / f"{name} public", say=lambda _: None)
    files = [(tmp_path / f"{name} public" / "model.safetensors").read_bytes() for name in ("plain", "padded")]
    assert files[0] == files[1]
    abstract = abstract_component(ModelConfig(plain.embedding, plain.llm), "llm", placement)
    for path, leaf in host(load_component(tmp_path / "padded", "llm", abstract)).items():
        np.testing.assert_array_equal(leaf, host(params["plain"]["llm"])[path])
    fewer = dataclasses.replace(plain.llm, vocab_size=300)
    with pytest.raises(UserError, match=r"has shape \(.* is needed"):
        load_component(tmp_path / "padded", "llm", abstract_component(ModelConfig(llm=fewer), "llm", placement))
