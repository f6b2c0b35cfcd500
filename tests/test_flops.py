"""Analytic FLOPs against those that XLA counts in programs: unrolled layers, dense attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from hovle_jax.components import select, unboxed
from hovle_jax.config import ExecutionConfig
from hovle_jax.data.batch import BatchShape
from hovle_jax.model import flops, presets
from hovle_jax.model.adapters import AdapterConfig
from hovle_jax.model.clip_config import ResNetConfig
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from hovle_jax.model.resnet import ModifiedResNet
from hovle_jax.model.transformer import MATMULS, Stack
from hovle_jax.model.vit import VisionTransformer
from hovle_jax.training.stages import STAGES
from hovle_jax.training.step import total_loss
from tests import micro

ROWS = 2
# Wide enough that norms, rotations and softmax, which are not counted, do not matter.
STACK = StackConfig(num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=1024)
TOWER = dict(image_size=64, width=384, num_heads=6, mlp_width=1536)


def wide(stage, variant="pre", execution=ExecutionConfig(unroll_layers=True), **changes):
    """A micro run with wider models; HD has 2 tiles of 64 patches and 16 tokens in the short stream."""
    config = micro.run_config(stage, variant, **changes)
    embedding = dataclasses.replace(config.model.embedding, stack=STACK, image_size=64, vocab_size=1024)
    llm = dataclasses.replace(config.model.llm, stack=STACK, vocab_size=1024)
    clip = dataclasses.replace(
        config.clip,
        vision=dataclasses.replace(config.clip.vision, **TOWER),
        text=dataclasses.replace(config.clip.text, width=384, num_heads=6, mlp_width=1536, context=64),
        projection_width=128,
    )
    vision = dataclasses.replace(config.teacher.vision, **TOWER)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, embedding=embedding, llm=llm),
        clip=clip,
        teacher=dataclasses.replace(config.teacher, vision=vision, projector_width=256),
        data=dataclasses.replace(config.data, batch_size=ROWS, sequence_length=128, tiles=2),
        execution=execution,
    )


def batch_of(config):
    """The shapes of a batch."""
    shape = BatchShape.of(config.data, config.model.embedding, 0)
    text = config.clip.text.context if config.stage == "contrast" else shape.length
    visual = shape.tiles * shape.tokens_per_tile
    ids = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), text)
    weights = {"loss_weights": text, "text_weights": text, "image_weights": visual}
    if config.stage != "pretrain":
        ids["image_positions"] = visual
    if shape.expansion > 1:
        ids |= dict.fromkeys(("long_tokens", "long_positions", "long_segment_ids"), shape.long_length)
        ids |= {"long_image_positions": visual * shape.expansion, "long_text_positions": text}
    batch = {name: jax.ShapeDtypeStruct((ROWS, size), jnp.int32) for name, size in ids.items()}
    batch |= {name: jax.ShapeDtypeStruct((ROWS, size), jnp.float32) for name, size in weights.items()}
    side = shape.tile_size
    return batch | {"tiles": jax.ShapeDtypeStruct((ROWS, shape.tiles, side, side, 3), jnp.uint8)}


def counted(config):
    """FLOPs of the loss of a stage and its gradient, as XLA counts them in the program, which need not be compiled."""
    run, batch = micro.run(config), batch_of(config)
    params = run.abstract_params()
    trains = lambda path: STAGES[config.stage].trains(path, config.model_config)
    trained, frozen = select(params, trains), select(params, lambda path: not trains(path))
    gradient = jax.grad(functools.partial(total_loss, stage=config.stage, models=run.models), has_aux=True)
    return jax.jit(gradient).lower(trained, frozen, batch).cost_analysis()["flops"]


CASES = [
    ("pretrain", {}),
    ("contrast", {}),
    ("distill", {}),
    ("distill", dict(teacher="internvit", projector="mlp1")),
    ("align", {}),
    ("align", dict(variant="post")),
    ("instruct", {}),
    ("instruct", dict(variant="none")),
    ("instruct", dict(variant="post", tied=True)),
    ("instruct", dict(adapter=AdapterConfig(rank=1))),
    ("instruct", dict(adapter=AdapterConfig(rank=1, targets="llm/stack/*,embedding/stack/*"))),
]


@pytest.mark.parametrize("stage, changes", CASES)
def test_a_step_has_the_flops_that_xla_counts(stage, changes):
    config = wide(stage, **changes)
    analytic = step_flops(config)
    # XLA's attention computes the whole square, which is what `hardware` says.
    assert counted(config) == pytest.approx(analytic.hardware, rel=0.03)
    assert analytic.model <= analytic.hardware
    assert sum(analytic.parts.values()) == analytic.model


def step_flops(config, **how):
    return STAGES[config.stage].step_flops(config, **how)


def forward(module, *shapes):
    """FLOPs of a module's forward pass as XLA counts them."""
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    params = unboxed(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return jax.jit(module.apply).lower(params, *inputs).cost_analysis()["flops"]


def test_forward_passes_of_the_modules():
    execution, ids = Execution(unroll_layers=True), ((1, 128), jnp.int32)
    work = flops.decoder_stack(STACK, 128)
    found = forward(Stack(STACK, execution), ((1, 128, 256), jnp.float32), ids, ids)
    assert found == pytest.approx(work.dense + work.square, rel=0.02)
    assert work.attention == work.square * 129 / 256
    llm = wide("pretrain").model.llm
    head = flops.llm_head(llm, 128)
    assert forward(LanguageModel(llm, execution), ids, ids, ids) == pytest.approx(
        work.dense + work.square + head.dense, rel=0.02
    )
    tower = wide("contrast").clip.vision
    work = flops.encoder_stack(tower, tower.num_layers, 65) + flops.patch_embedding(64, 8, 384)
    found = forward(VisionTransformer(tower, execution), ((1, 64, 64, 3), jnp.uint8))
    assert found == pytest.approx(work.forward, rel=0.04)  # the exact GELU is a long polynomial


@pytest.mark.parametrize("remat, tolerance", [("full", 0.05), ("dots", 0.15), (MATMULS, 0.25), ("query,up", 0.05)])
def test_recomputation(remat, tolerance):
    """XLA counts the body of a loop once: the difference that rematerialisation makes is that of one layer.

    Beside attention alone ("dots") the norms and activations that are made again count more.
    """
    kept, again = (wide("pretrain", execution=ExecutionConfig(remat=r)) for r in ("none", remat))
    difference = counted(again) - counted(kept)
    analytic = step_flops(again).hardware - step_flops(kept).hardware
    assert difference == pytest.approx(analytic / STACK.num_layers, rel=tolerance)
    assert step_flops(again).model == step_flops(kept).model


def test_the_paper_s_model():
    """Two FLOPs a parameter and token, six with its gradients; what stands in tables costs nothing."""
    model = presets.hovle_model()
    llm = LanguageModel(model.llm, Execution())
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = unboxed(jax.eval_shape(llm.init, jax.random.key(0), ids, ids, ids))["params"]
    kernels = sum(x.size for path, x in flatten_dict(params).items() if path[-1] == "kernel")
    work = flops.decoder_stack(model.llm.stack, 4096) + flops.llm_head(model.llm, 4096)
    assert work.dense == 2 * 4096 * kernels
    # Scores and their product with the values: 2 x 2 FLOPs x 2048 channels x 24 layers for each visible pair.
    assert work.attention == 4 * 2048 * 24 * 4096 * 4097 / 2


def test_what_implementations_add():
    config = wide("instruct", execution=ExecutionConfig(remat="full"))
    plain, splash = step_flops(config), step_flops(config, attention="splash")
    assert plain.model == splash.model
    stacks = 2 * flops.decoder_stack(STACK, 128).attention * ROWS
    square = 2 * flops.decoder_stack(STACK, 128).square * ROWS
    # Forward twice and five products instead of four in the backward pass, each over visible pairs alone.
    assert splash.hardware - plain.hardware == pytest.approx((2 + 5 / 2) * stacks - (2 + 4 / 2) * square)
    head = flops.llm_head(config.model.llm, 128).dense * ROWS
    assert step_flops(config, logits_kept=False).hardware - plain.hardware == pytest.approx(head)


def test_a_step_grows_with_its_rows_and_with_the_long_stream_of_hd():
    config = wide("align", "post")
    assert step_flops(config, rows=6).model == pytest.approx(3 * step_flops(config, rows=2).model)
    # 2 tiles of 16 tokens in the short stream and 64 in the long one.
    layers = flops.decoder_stack(STACK, 128 + 2 * 48)
    assert step_flops(config).parts["embedding layers"] == 3 * layers.forward * ROWS


def test_the_towers_of_clip():
    """Every product of a tower with a MAP head, and of a ResNet, beside XLA's count."""
    clip = wide("contrast").clip
    tower = dataclasses.replace(
        clip.vision, class_token=False, pre_norm=False, norm_tokens=True, pooling="map", activation="quick_gelu"
    )
    with_head = dataclasses.replace(clip, vision=tower, projection_width=384, vision_projection="none")
    work = flops.clip_vision_layers(with_head) + flops.clip_vision_ends(with_head)
    found = forward(VisionTransformer(tower, Execution(unroll_layers=True)), ((1, 64, 64, 3), jnp.uint8))
    assert found == pytest.approx(work.forward, rel=0.02)
    tower = ResNetConfig(image_size=96, width=32, layers=(2, 1, 1, 2), num_heads=16)
    work = flops.clip_vision_ends(dataclasses.replace(with_head, vision=tower, projection_width=128))
    found = forward(ModifiedResNet(tower, 128, Execution()), ((1, 96, 96, 3), jnp.uint8))
    assert found == pytest.approx(work.forward, rel=0.06)  # XLA leaves out what convolutions take from the padding
