"""Runs of the paper's shape with narrow models, whose steps compile for TPUs in seconds."""

import dataclasses
import functools
import pathlib

import pytest

from hovle_jax import train
from hovle_jax.aot.compiling import compile_for
from hovle_jax.hardware import topology
from hovle_jax.model.config import StackConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]


libtpu = pytest.mark.skipif(not topology.has_libtpu(), reason="libtpu is not installed (the extra 'tpu')")


def small(stage, preset="hovle", rows=32, length=512, width=256, execution=None, **mesh):
    """The paper's config with two narrow layers a stack and tiles of 112 pixels."""
    stack = StackConfig(
        num_layers=2, width=width, num_heads=width // 128, num_kv_heads=1, head_dim=128, mlp_width=2 * width
    )
    config = train.stage_config(ROOT / "configs", stage, preset)
    replace = dataclasses.replace
    embedding = replace(config.model.embedding, stack=stack, image_size=112, vocab_size=1024)
    model = replace(config.model, embedding=embedding, llm=replace(config.model.llm, stack=stack, vocab_size=1024))
    vision = replace(config.teacher.vision, image_size=112, width=128, num_layers=2, num_heads=2, mlp_width=256)
    return replace(
        config,
        model=model,
        teacher=replace(config.teacher, vision=vision, projector_width=width),
        data=replace(config.data, batch_size=rows, sequence_length=length, tiles=2),
        mesh=replace(config.mesh, **mesh),
        execution=replace(config.execution, vocab_chunk=256, **(execution or {})),
    )


@functools.cache
def compiled(stage="instruct", preset="hovle", place=("v5e-16", 1), execution=(), mesh=(), **sizes):
    """The report of a small step; `execution` and `mesh` are pairs of names and values."""
    config = small(stage, preset, execution=dict(execution), **sizes, **dict(mesh))
    return compile_for(config, topology.find(*place), with_forecast=False)  # which compiles each kernel again
