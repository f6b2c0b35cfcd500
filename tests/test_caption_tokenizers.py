"""CLIP's and SigLIP's tokenizers from their public files: the public code's ids, for texts of all scripts."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hovle_jax.checkpoints import load_model_config
from hovle_jax.conversion.caption_tokenizers import read_caption_tokenizer
from hovle_jax.conversion.exporting import export_model
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.data.text import cleaning
from hovle_jax.data.text.tokenizer import load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats.families import open_checkpoint
from tests import shared

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = shared.OWN / "caption-tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
# Whose ids, the files that it reads, a checkpoint of the kind, (bos, eos) of these small ones.
KINDS = {
    "open_clip": (("bpe_simple_vocab_16e6.txt.gz",), "clip-open-options", (712, 713)),
    "clip": (("vocab.json", "merges.txt"), "clip-hf-options", (712, 713)),
    "siglip": (("spiece.model",), "siglip-hf-options", (None, 1)),
}


@pytest.fixture
def folder(tmp_path, request):
    """A checkpoint with a tokenizer's files beside it, and a vocabulary that is large enough."""
    files, name, _ = KINDS[request.param]
    shutil.copytree(shared.golden(name), tmp_path / "public")
    for file in files:
        shutil.copy(GOLDEN / file, tmp_path / "public" / file)
    size = 1100
    weights = next((tmp_path / "public").glob("*.safetensors"))
    stored = load_file(weights)
    key = next(k for k in stored if k.endswith("token_embedding.weight"))
    save_file(stored | {key: np.zeros((size, stored[key].shape[1]), np.float32)}, weights)
    path = next((tmp_path / "public").glob("*config.json"))
    config = json.loads(path.read_text())
    (config["model_cfg"]["text_cfg"] if "model_cfg" in config else config["text_config"])["vocab_size"] = size
    path.write_text(json.dumps(config))
    return tmp_path / "public"


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_ids_are_those_of_the_public_code(folder, request, tmp_path):
    kind = request.node.callspec.params["folder"]
    tokenizer = read_caption_tokenizer(folder, open_checkpoint(folder))
    assert (tokenizer.bos, tokenizer.eos) == KINDS[kind][2]
    tokenizer.save(tmp_path)
    for read in (tokenizer, load_tokenizer(tmp_path)):
        wrong = [
            text for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][kind], strict=True) if read.encode(text) != ids
        ]
        assert not wrong
    assert tokenizer.decode(tokenizer.encode("a photo of the cat")).strip() == "a photo of the cat"


@pytest.mark.parametrize("folder", ["clip"], indirect=True)
def test_it_goes_in_and_out_with_the_checkpoint(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!", "bos_token": "<|startoftext|>"}))
    import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert tokenizer.encode("A  Cat") == tokenizer.encode("a cat")
    text = load_model_config(tmp_path / "ours").clip.text
    assert (text.pad_id, text.end_id) == (0, 17)  # '!' is the first letter; a text is read where the config says
    export_model(tmp_path / "ours", tmp_path / "again", say=lambda _: None)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("folder", ["siglip"], indirect=True)
def test_siglip_ends_and_pads_by_its_tokenizer(folder, tmp_path):
    import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)
    text = load_model_config(tmp_path / "ours").clip.text
    assert (text.end_id, text.padding_id) == (1, 1)
    assert load_tokenizer(tmp_path / "ours").encode("A cat!!") == load_tokenizer(tmp_path / "ours").encode("a cat")


@pytest.mark.parametrize("folder", ["clip", "open_clip"], indirect=True)
def test_broken_files(folder, request, tmp_path):
    if (folder / "vocab.json").is_file():
        (folder / "merges.txt").write_text("#version\na b c\n")
        message = "merges.txt is not a list of merges"
    else:
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"no archive")
        message = "the tokenizer in .* cannot be read"
    with pytest.raises(UserError, match=message):
        import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)


@pytest.mark.parametrize("folder", ["clip"], indirect=True)
def test_a_vocabulary_of_another_kind(folder, tmp_path):
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(UserError, match="lacks '<|startoftext|>': it is not CLIP's"):
        import_checkpoint(folder, tmp_path / "ours", say=lambda _: None)


def test_texts_are_cleaned():
    clean = cleaning.CLEANERS
    assert clean["clip_lower"](" Tom &amp;amp; \uff2aERRY\n\u201cﬁne\u201d ") == 'tom & jerry "fine"'
    assert clean["clip_whitespace"]("A\t B") == "A B"
    assert clean["clip_canonicalize"]("A_cat, sat!") == "a cat sat"
    assert clean["siglip"]("A_cat,  sat!") == "acat sat"
    assert (
        sorted(cleaning.byte_letters()) == sorted(set(cleaning.byte_letters())) and len(cleaning.byte_letters()) == 256
    )
