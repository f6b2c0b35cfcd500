"""`convert verify` tells right from wrong, and says what of a reference makes no sense."""

import json

import jax
import numpy as np
import pytest

from hovle_jax.conversion.verify import verify
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.model.execution import Execution
from hovle_jax.model.hovle import LanguageModel
from tests.public_models import change_config, public_folder
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def public(tmp_path):
    """A small public InternLM2 -> its folder."""
    return public_folder(tmp_path, "internlm2")


def test_verify_tells_right_from_wrong(public):
    checkpoint = open_checkpoint(public)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    index, ones = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape), np.ones_like(tokens)
    model = LanguageModel(checkpoint.config, Execution())
    logits = np.array(jax.jit(model.apply)({"params": checkpoint.load()}, tokens, index, ones))
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


def test_nothing_compared_is_nothing_passed(public):
    np.savez(public / "expected.npz", other=np.ones(3))
    result = command("convert", "verify", public, "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout)["passed"] is False
    assert "holds no array that can be compared" in result.stderr


IDS = np.arange(12).reshape(2, 6)
ONES = np.ones_like(IDS)
WRONG = {  # arrays -> what the line says
    "labels of another type": (dict(input_ids=IDS, labels=IDS * 1.0), "labels holds float64; integer numbers are"),
    "labels of another shape": (dict(input_ids=IDS, labels=IDS[:1]), r"labels of shape \[1, 6\] must be \[2, 6\]"),
    "labels that are no ids": (dict(input_ids=IDS, labels=IDS + 40), "labels have ids 41 to 51, and there are 40"),
    "labels of nothing": (dict(input_ids=IDS, labels=ONES * -100), "labels are -100 everywhere"),
    "a mask of nothing": (dict(input_ids=IDS, attention_mask=ONES * 0, logits=np.zeros((2, 6, 40))), "leaves nothing"),
    "a mask of fewer rows": (dict(input_ids=IDS, attention_mask=ONES[:1]), r"attention_mask of shape \[1, 6\] must"),
    "a gradient of nothing": (dict(input_ids=IDS, labels=IDS, **{"grad.none": ONES}), "grad.none: the checkpoint"),
    "gradients without labels": (
        {"input_ids": IDS, "grad.output.weight": np.ones((40, 32))}, "grad.output.weight and no labels"
    ),
    "a sequence as short as its prompt": (
        dict(greedy_prompt=IDS, greedy_sequence=IDS[:, :4]), "greedy_sequence has 4 tokens, no more than the prompt's 6"
    ),
    "one number for a sequence": (
        dict(greedy_prompt=IDS, greedy_sequence=np.int64(3)), r"greedy_sequence of shape \[\] must be \[2, any\]"
    ),
    "a batch with a shorter mask": (
        dict(batch_prompt=IDS, batch_prompt_mask=ONES[:1], batch_greedy_sequences=IDS), r"batch_prompt_mask of shape"
    ),
    "words": (dict(input_ids=np.array(["a"])), "input_ids holds <U1, not numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_references_that_make_no_sense(name, public):
    arrays, message = WRONG[name]
    np.savez(public / "expected.npz", **arrays)
    with pytest.raises(UserError, match=message):
        verify(public)


TILE = np.zeros((1, 3, 32, 32))
PROMPT = np.array([[5, *[9] * 4, 6]])  # 9 stands for the image in the config
HD_PROMPT = np.array([[5, *[9] * 16, 6]])
WRONG_IMAGES = {  # model, arrays -> what the line says
    "one greedy token": ("hovle", dict(greedy_tokens=np.int64(3)), r"greedy_tokens of shape \[\] must be \[any\]"),
    "an image too many": ("hovle", dict(pixel_values=np.zeros((2, 3, 32, 32))), "8 visual tokens and 4 places"),
    "pixels of one number": ("hovle", dict(pixel_values=np.float32(3)), r"pixel_values of shape \[\] must be"),
    "a longer stream": (
        "hovle hd, special tokens, unit output", dict(hd_input_ids=np.append(HD_PROMPT, [[7]], 1)), "input_ids has 2"
    ),
    "fewer places in it": (
        "hovle hd, special tokens, unit output", dict(hd_input_ids=HD_PROMPT[:, 1:-2]), "16 visual tokens and 15 places"
    ),
    "several ids of the image token": (
        "internvl2", dict(img_context_token_id=np.array([9, 8])), r"img_context_token_id of shape \[2\] must be one"
    ),
    "flags of other tiles": (
        "internvl2", dict(img_context_token_id=9, image_flags=np.ones(3)), "3 image_flags and 1 tiles"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_references_with_images_that_make_no_sense(name, tmp_path):
    model, arrays, message = WRONG_IMAGES[name]
    folder = public_folder(tmp_path, model)
    if model != "internvl2":
        change_config(folder, "embedding_config", img_context_token_id=9)
    given = dict(input_ids=PROMPT, pixel_values=TILE) | ({"hd_input_ids": HD_PROMPT} if "hd" in model else {})
    np.savez(folder / "expected.npz", **given | arrays)
    with pytest.raises(UserError, match=message):
        verify(folder)
