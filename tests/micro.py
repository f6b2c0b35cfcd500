"""Micro runs: every stage and variant at a width of 32, on a corpus of 24 generated images."""

import dataclasses
import functools

import jax
import numpy as np

from hovle_jax import recipes
from hovle_jax.checkpoints import save_model
from hovle_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, RunConfig, TokenizerConfig
from hovle_jax.corpora import easy_vqa
from hovle_jax.corpora.in_memory import InMemoryCorpus
from hovle_jax.data import pipeline
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.model.clip_config import CLIPConfig, TextTowerConfig
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig, LLMConfig, StackConfig, ViTConfig
from hovle_jax.model.teacher_config import TeacherConfig
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training.setup import Run, build
from hovle_jax.training.stages import STAGES
from hovle_jax.training.state import make_state
from hovle_jax.training.step import train_step
from hovle_jax.training.weights import copy_text_table

VOCAB = 320
SYSTEM = "be brief."
SIZE = 32
COLOUR_VALUES = dict(
    black=(0, 0, 0), blue=(0, 0, 255), brown=(139, 69, 19), gray=(128, 128, 128),
    green=(0, 128, 0), red=(255, 0, 0), teal=(0, 128, 128), yellow=(255, 255, 0),
)  # fmt: skip


def draw(color, shape):
    """[SIZE, SIZE, 3] uint8: a shape off the centre on white."""
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = {
        "circle": (y - 14) ** 2 + (x - 18) ** 2 < 64,
        "rectangle": (abs(y - 12) < 5) & (abs(x - 16) < 10),
        "triangle": (y < 24) & (y > 6 + 2 * abs(x - 13)),
    }[shape]
    return np.where(inside[..., None], COLOUR_VALUES[color], 255).astype(np.uint8)


@functools.cache
def examples():
    """One example for each of the 24 captions."""
    made = []
    for index, caption in enumerate(easy_vqa.CAPTIONS):
        _, color, shape = caption.split()
        questions = (
            ("what color is the shape?", color),
            ("what shape is in the image?", shape),
            (f"is there a {color} shape?", "yes"),
            (f"is there not a {shape} in the image?", "no"),
        )
        made.append(easy_vqa.Example(index, draw(color, shape), questions, easy_vqa.deduce_caption(questions)))
    return tuple(made)


def corpus():
    return InMemoryCorpus(list(examples()))


@functools.cache
def tokenizer() -> Tokenizer:
    return pipeline.train_tokenizer(run_config("pretrain"), corpus())


def vision_tower(**changes):
    return ViTConfig(image_size=SIZE, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64, **changes)


def clip_config():
    vision = vision_tower(layer_scale=False, patch_bias=False, pre_norm=True, post_norm=True)
    text = TextTowerConfig(vocab_size=VOCAB, width=32, num_layers=1, num_heads=2, mlp_width=64, context=24, end_id=2)
    return CLIPConfig(vision=vision, text=text, projection_width=16)


def teacher_config(kind="clip", projector="linear"):
    vision = clip_config().vision if kind == "clip" else vision_tower()
    return TeacherConfig(kind=kind, vision=vision, projector=projector, projector_width=32)


def model_config(variant="pre", special=0, normalize_output=False, tied=False):
    """`variant`: pixel_shuffle; `special`: rows of the second text table, taken off the first one."""
    stack = StackConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
    embedding = EmbeddingConfig(
        stack=stack, image_size=SIZE, patch_size=8, vocab_size=VOCAB - special, pixel_shuffle=variant,
        num_special_tokens=special, normalize_output=normalize_output,
    )  # fmt: skip
    llm = LLMConfig(stack=stack, vocab_size=VOCAB, max_length=512, tied=tied)
    return HoVLEConfig(embedding=embedding, llm=llm)


def run_config(
    stage, variant="pre", teacher="clip", projector="linear", special=0, tied=False, data=None, **changes
) -> RunConfig:
    """A run of one stage; `data` changes fields of its DataConfig, the rest those of RunConfig."""
    base = RunConfig.from_dict(recipes.base(stage, "tiny").to_dict())
    lengths = {"pretrain": 192, "distill": 64}
    made = dict(
        batch_size=8, sequence_length=lengths.get(stage, 88), random_tokens=6, augment=True, system_message=SYSTEM
    )
    config = dataclasses.replace(
        base,
        model=model_config(variant, special, tied=tied),
        clip=clip_config(),
        teacher=teacher_config(teacher, projector),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        data=dataclasses.replace(base.data, **(made | (data or {}))),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1),
        execution=ExecutionConfig(),
        steps=8,
    )
    return dataclasses.replace(config, **changes)


def one_device():
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def run(config, mesh=None) -> Run:
    """The set-up on a mesh; None: of one device."""
    return build(config, mesh or one_device())


def models(config):
    """The modules of a run on one device."""
    return run(config).models


def dataset(config):
    return pipeline.build_dataset(config, STAGES[config.stage].batch, tokenizer(), corpus())


@functools.cache
def _params(config):
    """Random values of numpy: compiling the real initialisation takes longer than most tests."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    rng, made = np.random.default_rng(0), {}
    for path, leaf in sorted(flatten_dict(run(config).abstract_params()).items()):
        fan_in = leaf.shape[-2] if path[-1] == "kernel" else 32
        value = rng.normal(size=leaf.shape) / fan_in**0.5 + (path[-1] in ("scale", "log_scale"))
        made[path] = jax.device_put(np.asarray(value, np.float32), leaf.sharding)
    made = unflatten_dict(made)
    if "embedding" in made:
        copy_text_table(made, config.model)
    return jax.device_get(made), shardings(made)


def params(config, mesh=None):
    """Fresh parameters of a run; a copy, so that they may be donated. Copied by numpy, which compiles nothing."""
    values, places = _params(config)
    if mesh is not None:
        places = shardings(run(config, mesh).abstract_params())
    return jax.tree.map(lambda value, place: jax.device_put(value.copy(), place), values, places)


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def start(config, mesh=None, drawn=None):
    """-> (state at step 0, data set, function of (state, batch) -> (state, metrics)); without a mesh on one device.

    `drawn`: parameters in place of `params`; the state takes them over.
    """
    made = run(config, mesh)

    def step(state, batch):
        return train_step(state, made.placement.put_batch(batch), stage=config.stage, run=made)

    return make_state(STAGES[config.stage], made, drawn or params(config, mesh)), dataset(config), step


def trained(state, dataset, step, steps=6):
    """`steps` steps on two batches in turn, with what `start` gives -> (state, losses)."""
    losses = []
    for i in range(steps):
        state, metrics = step(state, dataset[i % 2])
        losses.append(float(metrics["loss"]))
    return state, losses


def finished_run(folder):
    """Writes a finished instruct run of random weights, which says the same nonsense each time -> its folder."""
    config = run_config("instruct")
    weights = params(config)
    kernel = weights["llm"]["head"]["kernel"]
    weights["llm"]["head"]["kernel"] = kernel.at[:, tokenizer().image_id].set(0)  # no image without one
    return _finished(folder, config, weights)


def finished_clip(folder, **changes):
    """The same of a contrast run, whose CLIPConfig has these changes."""
    config = run_config("contrast", clip=dataclasses.replace(clip_config(), **changes))
    return _finished(folder, config, params(config))


def _finished(folder, config, weights):
    components = STAGES[config.stage].result
    save_model(folder, config.model_config.only(components), {c: lambda c=c: weights[c] for c in components})
    tokenizer().save(folder)
    return folder
