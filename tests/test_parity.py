"""Our float32 numbers against the public PyTorch code's: forward, loss, gradients and greedy tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.conversion.verify import TOLERANCE, Reference, verify
from hovle_jax.conversion.verify.hovle import HoVLEInputs
from hovle_jax.errors import UserError
from hovle_jax.formats import hovle
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import load, to_public
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import HoVLE
from hovle_jax.model.teacher import VisionTeacher
from tests import shared

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = ("internlm2-", "internvit-", "internvl2-", "hovle-", "llama-", "qwen2-", "qwen3-")
CHECKPOINTS = [name for kind in KINDS for name in shared.folders(kind)]


@pytest.mark.parametrize("name", [*CHECKPOINTS, *shared.folders("gguf-")])
def test_numbers(name):
    if name.startswith("gguf-"):
        pytest.importorskip("gguf")
    report = verify(shared.golden(name))
    print(f"\nlargest error {max(report.errors.values()):.1e} ({max(report.errors, key=report.errors.get)})")
    assert not report.failed(TOLERANCE), {name: report.errors.get(name) for name in report.failed(TOLERANCE)}
    assert not report.unknown
    output = "last_hidden_state" if name.startswith("internvit-") else "logits"
    assert output in report.errors or name.startswith("gguf-")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_import_is_undone_exactly(name):
    checkpoint = open_checkpoint(shared.golden(name))
    back = to_public(checkpoint.rules, checkpoint.load())
    assert back.keys() == checkpoint.source.shapes.keys()
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, checkpoint.source.read(key), err_msg=key)


@pytest.mark.parametrize("name", shared.folders("hovle-")[:1])
def test_unused_parameters_have_no_gradient(name):
    folder = shared.golden(name)
    checkpoint, expected = open_checkpoint(folder), Reference(np.load(folder / "expected.npz"))
    config = checkpoint.config
    context_id = checkpoint.public_config["embedding_config"]["img_context_token_id"]
    batch, model = HoVLEInputs(config, context_id, expected).batch(), HoVLE(config)
    gradients = jax.jit(jax.grad(lambda params: jnp.std(model.logits(params, batch))))(checkpoint.load())
    public = to_public(checkpoint.rules, gradients)
    unused = {"embedding_model.vision_embeddings.class_embedding", "language_model.model.tok_embeddings.weight"}
    assert {key for key, gradient in public.items() if not np.any(gradient)} == unused


@pytest.mark.parametrize("name", shared.folders("internvl2-"))
def test_the_teacher_of_distillation_is_these_parts(name):
    folder = shared.golden(name)
    expected, checkpoint = np.load(folder / "expected.npz"), open_checkpoint(folder)
    tiles, features = expected["pixel_values"].transpose(0, 2, 3, 1), expected["projected_features"]
    teacher = VisionTeacher(checkpoint.config.teacher, Execution())
    apply = jax.jit(teacher.apply, static_argnums=2)
    target = apply({"params": checkpoint.load()["teacher"]}, tiles, features.shape[1])
    np.testing.assert_allclose(target, features, atol=TOLERANCE)


class InMemory:
    """Tensors as a source."""

    def __init__(self, tensors):
        self.shapes, self.read = {name: x.shape for name, x in tensors.items()}, tensors.__getitem__
        self.file_of = lambda name: "memory"


@pytest.mark.parametrize("name", shared.folders("hovle-")[:1])
def test_a_checkpoint_that_does_not_fit_fails_by_name(name):
    checkpoint = open_checkpoint(shared.golden(name))
    public_config, rules = checkpoint.public_config, checkpoint.rules
    tensors = {key: checkpoint.source.read(key) for key in checkpoint.source.shapes}
    missing, wqkv = "language_model.output.weight", "language_model.model.layers.0.attention.wqkv.weight"
    surplus = {k: x for k, x in tensors.items() if k != missing} | {"extra.weight": np.zeros(1, np.float32)}
    with pytest.raises(UserError, match=rf"lacks {missing}; it has unknown extra\.weight"):
        load(rules, InMemory(surplus))
    with pytest.raises(UserError, match=wqkv):
        load(rules, InMemory(tensors | {wqkv: tensors[wqkv][:-1]}))
    params = load(rules, InMemory(tensors))
    del params["llm"]["norm"]
    with pytest.raises(UserError, match="llm/norm/scale"):
        to_public(rules, params)
    for key in ("rope_theta", "rms_norm_eps", "use_pixel_shuffle_proj", "llm_vocab_size", "hidden_size"):
        embedding = {k: x for k, x in public_config["embedding_config"].items() if k != key}
        with pytest.raises(UserError, match=key):
            hovle.config_from_json(public_config | {"embedding_config": embedding})
