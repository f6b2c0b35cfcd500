"""Adapters in PEFT's layout: read, verified, written; of modules that are several of our kernels; what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax.conversion.verify import TOLERANCE, verify
from hovle_jax.conversion.verify.adapter import base_of
from hovle_jax.errors import UserError
from hovle_jax.formats import llms, peft
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import nested, to_public
from hovle_jax.model import adapters
from hovle_jax.model.adapters import AdapterConfig
from hovle_jax.model.config import LLMConfig, StackConfig
from tests import shared

pytestmark = pytest.mark.usefixtures("quick_compilation")
D, LAYERS, MODULE = 32, 2, "model.layers.{}.attention.wqkv"
STACK = StackConfig(num_layers=LAYERS, width=D, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
RULES = nested(llms.rules(LLMConfig(stack=STACK, vocab_size=64)), ours="llm")
WIDTHS = {"query": 32, "key": 16, "value": 16}


@pytest.mark.parametrize("name", shared.folders("peft-"))
def test_numbers(name):
    report = verify(shared.golden(name))
    assert report.passed(TOLERANCE) and not report.unknown, report.errors
    assert {"logits", "base_logits", "merged_logits"} <= set(report.errors)


@pytest.mark.parametrize("name", shared.folders("peft-"))
def test_what_was_read_is_written_again(name, tmp_path):
    folder = shared.golden(name)
    rules = open_checkpoint(base_of(folder)).component_rules()
    config, tree = peft.read(folder, rules)
    peft.write(tmp_path, rules, tree, config, "base")
    same(load_file(folder / peft.WEIGHTS), load_file(tmp_path / peft.WEIGHTS))
    before, after = (json.loads((path / peft.CONFIG).read_text()) for path in (folder, tmp_path))
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        assert before[key] == after[key]
    assert sorted(before["target_modules"]) == after["target_modules"]


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def written(folder, config=None, tensors=None, rank=3, layers=range(LAYERS), magnitude=False):
    """A PEFT adapter of InternLM2's wqkv -> its tensors."""
    rng, made = np.random.default_rng(0), {}
    for layer in layers:
        name = peft.PREFIX + MODULE.format(layer)
        made[f"{name}.lora_A.weight"] = rng.normal(size=(rank, D)).astype(np.float32)
        made[f"{name}.lora_B.weight"] = rng.normal(size=(64, rank)).astype(np.float32)
        if magnitude:
            made[f"{name}.lora_magnitude_vector"] = rng.uniform(1, 2, 64).astype(np.float32)
    made |= tensors or {}
    folder.mkdir(exist_ok=True)
    save_file(made, folder / peft.WEIGHTS)
    whole = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["wqkv"], "use_dora": magnitude}
    (folder / peft.CONFIG).write_text(json.dumps(whole | (config or {})))
    return made


def weights():
    """Kernels of a base."""
    rng = np.random.default_rng(1)
    kernels = {name: rng.normal(size=(LAYERS, D, width)).astype(np.float32) for name, width in WIDTHS.items()}
    return {"llm": {"stack": {"layers": {name: {"kernel": kernel} for name, kernel in kernels.items()}}}}


def public(params):
    rules = [rule for rule in RULES if rule.public.endswith("attention.wqkv.weight")]
    return to_public(rules, params)


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_module_that_is_three_kernels(magnitude, tmp_path):
    tensors = written(tmp_path / "a", magnitude=magnitude)
    config, tree = peft.read(tmp_path / "a", RULES)
    assert set(tree) == {f"llm/stack/layers/{name}" for name in WIDTHS} and config.scale == 2
    base, merged = weights(), adapters.merged(weights(), tree, config)
    for layer in range(LAYERS):
        name = MODULE.format(layer)
        a, b = (tensors[f"{peft.PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        expected = public(base)[f"{name}.weight"] + 2 * b @ a
        if magnitude:
            lengths = np.linalg.norm(expected, axis=1, keepdims=True)
            expected *= tensors[f"{peft.PREFIX}{name}.lora_magnitude_vector"][:, None] / lengths
        np.testing.assert_allclose(public(merged)[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)
    peft.write(tmp_path / "b", RULES, tree, config, "base")
    same(tensors, load_file(tmp_path / "b" / peft.WEIGHTS))


@pytest.mark.parametrize("stabilized", [False, True])
def test_three_adapters_become_one_of_three_ranks(stabilized, tmp_path):
    config, rng = AdapterConfig(2, 6.0, rank_stabilized=stabilized), np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tree = {f"llm/stack/layers/{n}": {"a": draw(LAYERS, D, 2), "b": draw(LAYERS, 2, w)} for n, w in WIDTHS.items()}
    peft.write(tmp_path / "a", RULES, tree, config, "base")
    read, again = peft.read(tmp_path / "a", RULES)
    assert read.rank == 6 and read.scale == pytest.approx(config.scale)
    for name, kernel in public(adapters.merged(weights(), tree, config)).items():
        np.testing.assert_allclose(public(adapters.merged(weights(), again, read))[name], kernel, rtol=1e-5, atol=1e-5)
    del tree["llm/stack/layers/key"]
    with pytest.raises(UserError, match="is one module in the public layout, and llm/stack/layers/key has no adapter"):
        peft.write(tmp_path / "c", RULES, tree, config, "base")


def test_ranks_and_scales_of_their_own_and_layers_without_an_adapter(tmp_path):
    other = f"{peft.PREFIX}model.layers.1.attention.wo"
    more = {
        f"{other}.lora_A.weight": np.ones((1, 32), np.float32),
        f"{other}.lora_B.weight": np.ones((D, 1), np.float32),
    }
    patterns = {"rank_pattern": {"wo": 1}, "alpha_pattern": {"wo": 5}}
    written(tmp_path, patterns | {"target_modules": ["wqkv", "wo"]}, more, layers=[0])
    config, tree = peft.read(tmp_path, RULES)
    kernel = np.zeros((LAYERS, 32, D), np.float32)
    params = {"llm": {"stack": {"layers": {"output": {"kernel": kernel}}}}}
    made = adapters.merged(params, tree, config)["llm"]["stack"]["layers"]["output"]["kernel"]
    np.testing.assert_allclose(made, np.stack([kernel[0], np.full((32, D), 5.0)]), rtol=1e-6)
    assert not tree["llm/stack/layers/query"]["b"][1].any()


def test_lengths_of_all_layers_are_needed(tmp_path):
    written(tmp_path, magnitude=True, layers=[0])
    with pytest.raises(UserError, match="all layers need an adapter, and model.layers.1.* has none"):
        peft.read(tmp_path, RULES)


@pytest.mark.parametrize("config, tensors, message", [
    ({"peft_type": "IA3"}, {}, "peft_type='IA3'; LORA is supported"),
    ({"bias": "all"}, {}, "bias='all' is not supported"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save=.*is not supported"),
    ({}, {"base_model.model.other.lora_A.weight": np.ones((1, 1), np.float32)}, "the base has no other; the adapter"),
    ({}, {"base_model.model.model.norm.weight": np.ones(1, np.float32)}, "is no tensor of a LoRA"),
    ({}, {f"{peft.PREFIX}model.layers.1.attention.wo.lora_A.weight": np.ones((3, 32), np.float32)}, "has no lora_B"),
    ({}, {f"{peft.PREFIX}{MODULE.format(0)}.lora_B.weight": np.ones((64, 5), np.float32)}, "no rank fits"),
])  # fmt: skip
def test_what_is_refused(config, tensors, message, tmp_path):
    written(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path, RULES)


def test_without_its_base_an_adapter_is_not_verified(tmp_path):
    written(tmp_path, {"base_model_name_or_path": "org/gone"})
    with pytest.raises(UserError, match="names the base 'org/gone', which is neither there nor beside the adapter"):
        base_of(tmp_path)
