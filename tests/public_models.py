"""Small models of every kind that public checkpoints hold, with random weights."""

import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from hovle_jax.checkpoints import save_model
from hovle_jax.components import shapes
from hovle_jax.config import ModelConfig
from hovle_jax.conversion.exporting import export_model
from hovle_jax.model.config import LLMConfig, RopeScaling, StackConfig, ViTConfig
from hovle_jax.model.teacher_config import TeacherConfig
from tests import micro

STACK = StackConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_theta=1e4)


def llm(family, tied=False, **stack):
    return LLMConfig(dataclasses.replace(STACK, **stack), vocab_size=40, max_length=64, tied=tied, family=family)


FACTORS = RopeScaling("factors", 1.0, 16, attention_factor=1.2, factors=(1.0, 1.5, 2.0, 4.0))
LLAMA3 = RopeScaling("llama3", 8.0, 16, low_frequency_factor=1.0, high_frequency_factor=4.0)
YARN = RopeScaling("yarn", 4.0, 16, beta_fast=30.0, beta_slow=2.0, attention_factor=1.2)
TOWER = ViTConfig(image_size=32, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64)
PLAIN_TOWER = dataclasses.replace(TOWER, norm="rms_norm", qkv_bias=False, qk_norm=True)
INTERNVIT = TeacherConfig("internvit", TOWER, projector="mlp1", projector_width=32)

MODELS = {
    "internlm2": ModelConfig(llm=llm("internlm2")),
    "internlm2, biases": ModelConfig(llm=llm("internlm2", qkv_bias=True, output_bias=True, num_kv_heads=4)),
    "internlm2, linear": ModelConfig(llm=llm("internlm2", rope_scaling=RopeScaling("linear", 2.0, 64))),
    "internlm2, dynamic": ModelConfig(llm=llm("internlm2", rope_scaling=RopeScaling("dynamic", 2.0, 64))),
    "llama": ModelConfig(llm=llm("llama", head_dim=12)),
    "llama, dynamic": ModelConfig(llm=llm("llama", rope_scaling=RopeScaling("dynamic", 3.0, 64))),
    "llama, biases, tied": ModelConfig(
        llm=llm("llama", tied=True, qkv_bias=True, output_bias=True, mlp_bias=True, rope_scaling=LLAMA3)
    ),
    "llama, yarn": ModelConfig(llm=llm("llama", rope_scaling=YARN, num_kv_heads=1)),
    "llama, longrope": ModelConfig(llm=llm("llama", rope_scaling=FACTORS)),
    "internlm2, tied": ModelConfig(llm=llm("internlm2", tied=True)),
    "qwen2": ModelConfig(llm=llm("qwen2", qkv_bias=True, rope_scaling=RopeScaling("linear", 2.0, 64))),
    "qwen3": ModelConfig(llm=llm("qwen3", qk_norm=True, head_dim=16, tied=True)),
    "internvit": ModelConfig(teacher=TeacherConfig("internvit", PLAIN_TOWER, projector="linear")),
    "internvl2": ModelConfig(teacher=INTERNVIT, llm=llm("internlm2")),
    "internvl2 over qwen2": ModelConfig(teacher=INTERNVIT, llm=llm("qwen2", qkv_bias=True)),
    "hovle": ModelConfig(embedding=micro.model_config().embedding, llm=micro.model_config().llm),
    "hovle hd, special tokens, unit output": ModelConfig(
        embedding=micro.model_config("post", special=9, normalize_output=True).embedding,
        llm=micro.model_config("post", special=9).llm,
    ),
    "hovle, stride": ModelConfig(embedding=micro.model_config("none").embedding, llm=micro.model_config("none").llm),
}
FORCED = dataclasses.replace(micro.model_config().embedding, force_image_size=48)
MODELS["hovle, larger tiles"] = ModelConfig(embedding=FORCED, llm=micro.model_config().llm)
for _kind in ("linear", "dynamic"):  # of the embedding alone
    _stack = dataclasses.replace(micro.model_config().embedding.stack, rope_scaling=RopeScaling(_kind, 2.0, 64))
    MODELS[f"hovle, {_kind}"] = ModelConfig(
        embedding=dataclasses.replace(micro.model_config().embedding, stack=_stack),
        llm=dataclasses.replace(micro.model_config().llm, max_length=64),
    )
QWEN3_STACK = dataclasses.replace(STACK, qk_norm=True, head_dim=12)
MODELS["hovle over qwen3"] = ModelConfig(
    embedding=dataclasses.replace(micro.model_config().embedding, stack=QWEN3_STACK, family="qwen3"),
    llm=LLMConfig(QWEN3_STACK, vocab_size=micro.VOCAB, max_length=64, tied=True, family="qwen3"),
)


def components_of(config):
    return [name for name in ("embedding", "llm", "teacher") if getattr(config, name) is not None]


def random_params(config, component):
    """Random values for every leaf (fresh biases and norms would be zeros and ones)."""
    abstract = shapes(config, component)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract)


def made(folder, config):
    """A model folder of random weights, as an import or a run leaves it -> {component: parameters}."""
    params = {component: random_params(config, component) for component in components_of(config)}
    folder.mkdir()
    save_model(folder, config, {component: lambda c=component: params[c] for component in params})
    return params


@functools.cache
def _made_once(name, options):
    """A temporary folder with `ours` and `public`, which is there as long as the process."""
    kept = tempfile.TemporaryDirectory(prefix="hovle_jax_public_")
    folder = pathlib.Path(kept.name)
    made(folder / "ours", MODELS[name])
    export_model(folder / "ours", folder / "public", say=lambda _: None, **dict(options))
    return kept


def public_folder(folder, name, **options):
    """One of `MODELS` as a public checkpoint, made in `folder` -> its folder, FOLDER/public (ours is FOLDER/ours)."""
    shutil.copytree(_made_once(name, tuple(options.items())).name, folder, dirs_exist_ok=True)
    return folder / "public"


def change_config(folder, *path, **changes):
    """Replaces keys of the object that lies at `path` in FOLDER/config.json."""
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in path:
        part = part[key]
    part |= changes
    (folder / "config.json").write_text(json.dumps(config))


def change_checkpoint(folder, config=None, **tensors):
    """Replaces keys of config.json, and tensors (None: removes it)."""
    change_config(folder, **(config or {}))
    stored = load_file(folder / "model.safetensors") | tensors
    save_file({k: x for k, x in stored.items() if x is not None}, folder / "model.safetensors")
