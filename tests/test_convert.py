"""Public checkpoints in and out: round trips to the bit, and what is wrong with a checkpoint said by name."""

import dataclasses
import errno
import json
import logging
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax.checkpoints import abstract_component, load_component, load_model_config, save_model
from hovle_jax.components import shapes as shapes_of
from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.conversion.exporting import DTYPES, export_model, make_index, scheme
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.errors import UserError
from hovle_jax.formats import llms
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model.config import RopeScaling
from hovle_jax.model.hovle import HoVLE, LanguageModel
from hovle_jax.model.presets import hovle_model
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.sharding.placement import Placement
from hovle_jax.system.files import whole_folder
from hovle_jax.training.losses import cross_entropy, divide
from tests import micro
from tests.public_models import MODELS, components_of, llm, made
from tests.test_commands import ROOT, command
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
    with pytest.raises(UserError, match="has no embedding; it holds teacher and llm"):
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
    rules, _ = scheme(config)
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


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong with a checkpoint.


@pytest.fixture
def public(tmp_path):
    """A small public InternLM2 -> its folder."""
    made(tmp_path / "ours", MODELS["internlm2"])
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    return tmp_path / "public"


def change(folder, config=None, **tensors):
    """Replaces keys of config.json, and tensors (None: removes it)."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    stored = load_file(folder / "model.safetensors") | tensors
    save_file({k: x for k, x in stored.items() if x is not None}, folder / "model.safetensors")


WQKV = "model.layers.1.attention.wqkv.weight"
BROKEN = {
    "wrong shape": (dict(tensors={WQKV: np.zeros((60, 32), np.float32)}), [WQKV, "[60, 32]"]),
    "transposed": (dict(tensors={"model.tok_embeddings.weight": np.zeros((32, 40), np.float32)}), ["tok_embeddings"]),
    "missing": (dict(tensors={WQKV: None}), ["lacks", WQKV]),
    "surplus": (dict(tensors={"extra": np.zeros(1, np.float32)}), ["unknown extra"]),
    "architecture": (dict(config={"model_type": "mamba"}), ["'mamba'", "internlm2", "qwen3"]),
    "option": (dict(config={"rope_scaling": {"type": "longrope"}}), ["rope_scaling", "longrope"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint(name, public):
    changes, parts = BROKEN[name]
    change(public, changes.get("config"), **changes.get("tensors", {}))
    result = command("convert", "import", public, public.parent / "dst")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert not (public.parent / "dst").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None must be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be an integer of at least 1"),
        ({"vocab_size": "40"}, "vocab_size='40' must be an integer"),
        ({"rope_theta": "x"}, "rope_theta='x' must be a positive number"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads=3"),
        ({"model_type": ["llama"]}, "is not supported"),
    ],
)
def test_config_values_that_make_no_sense(change, message, public):
    path = public / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"{path}.*{message}"):
        open_checkpoint(public)


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x"}}', "{"]
)
def test_a_broken_index(index, public):
    (public / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(public)


def test_types_that_float32_does_not_hold(public):
    change(public, **{WQKV: np.zeros((64, 32), np.float64)})
    with pytest.raises(UserError, match=rf"model\.safetensors: {WQKV} has the type F64; supported: F32, BF16, F16"):
        open_checkpoint(public)


def test_a_tied_head_that_is_stored(tmp_path):
    """A copy is written again; one that differs is a head of its own, as transformers reads it."""
    made(tmp_path / "ours", ModelConfig(llm=llm("llama", tied=True)))
    export_model(tmp_path / "ours", tmp_path / "public", say=lambda _: None)
    table = load_file(tmp_path / "public" / "model.safetensors")["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}  # of old checkpoints: ignored
    change(tmp_path / "public", **{"lm_head.weight": table}, **buffers)
    assert open_checkpoint(tmp_path / "public").config.tied
    import_checkpoint(tmp_path / "public", tmp_path / "back", say=lambda _: None)
    export_model(tmp_path / "back", tmp_path / "again", say=lambda _: None)
    again = load_file(tmp_path / "again" / "model.safetensors")
    np.testing.assert_array_equal(again["lm_head.weight"], table)
    change(tmp_path / "public", **{"lm_head.weight": table + 1})
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


def test_broken_files(public):
    path = public / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        open_checkpoint(public)
    path.write_bytes(whole)
    (public / "copy.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"lies in copy\.safetensors and model\.safetensors"):
        open_checkpoint(public)
    (public / "copy.safetensors").unlink()
    path.rename(public / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle files \(pytorch_model\.bin\)"):
        open_checkpoint(public)
    (public / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_checkpoint(public)


def test_a_hub_id(public, tmp_path, monkeypatch):
    hub = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    hub.snapshot_download = lambda name, **_: {"some/model": str(public)}[name]
    import_checkpoint("some/model", tmp_path / "dst", say=lambda _: None)
    assert load_model_config(tmp_path / "dst").llm.family == "internlm2"

    def offline(*_, **__):
        raise RuntimeError("no route to the hub")  # its errors are of many classes

    hub.snapshot_download = offline
    with pytest.raises(UserError, match=r"some/other is not a path here and cannot be fetched .*no route"):
        import_checkpoint("some/other", tmp_path / "dst2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        import_checkpoint("some/other", tmp_path / "dst2")


def test_values_that_are_not_finite_are_counted(public, caplog):
    bad = np.zeros((40, 32), np.float32)
    bad[0, :3] = np.nan
    change(public, **{"output.weight": bad})
    with caplog.at_level(logging.WARNING):
        open_checkpoint(public).load()
    assert "output.weight: 3 of 1280 values are not finite" in caplog.text


@pytest.mark.parametrize("action", ["import", "export"])
def test_what_cannot_be_written_leaves_nothing(action, public, tmp_path):
    """Files may not grow beyond some bytes in this process: the system's refusal comes through all the libraries."""
    source = {"import": public, "export": tmp_path / "ours"}[action]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", sys.executable, "-m", "hovle_jax.convert"]
    line = [*limited, action, source, tmp_path / "out"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"error: cannot write {tmp_path / 'out'}: File too large; nothing was left behind" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    reported = "RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"  # as tensorstore says it
    with pytest.raises(UserError, match="the disk is full"), whole_folder(tmp_path / "out"):
        raise ValueError(reported)
    with pytest.raises(KeyError), whole_folder(tmp_path / "new" / "out"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()  # somebody else's
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"), whole_folder(tmp_path / "file"):
        pass
    (tmp_path / "file").unlink()
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"out", "out/file", "out.partial"}


def test_verify_tells_right_from_wrong(public):
    checkpoint = open_checkpoint(public)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    index, ones = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape), np.ones_like(tokens)
    model = LanguageModel(checkpoint.config, micro.run_config("pretrain").execution)
    logits = np.array(model.apply({"params": checkpoint.load()}, tokens, index, ones))
    np.savez(public / "expected.npz", input_ids=tokens, logits=logits, other=ones)
    good = command("convert", "verify", public, "--json")
    assert good.returncode == 0, good.stderr
    report = json.loads(good.stdout)
    assert report["passed"]
    assert report["unknown"] == ["other"]
    logits[0, 0, 0] += 1e-3
    np.savez(public / "expected.npz", input_ids=tokens, logits=logits)
    bad = command("convert", "verify", public)
    assert bad.returncode == 2
    assert "logits differ by more than 2e-05" in bad.stderr
    assert command("convert", "verify", public, "--tolerance=0.01").returncode == 0


def test_usage():
    for arguments in ((), ("compress",), ("import", "a")):
        result: subprocess.CompletedProcess = command("convert", *arguments)
        assert result.returncode == 2
        assert "import SRC DST" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies that are padded for a mesh.


@pytest.mark.parametrize("tied", [False, True])
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
            return divide(cross_entropy(run.logits(params, batch), batch["targets"], batch["loss_weights"]))

        results.append((run.logits(params[name], batch), *jax.value_and_grad(loss)(params[name])))
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
