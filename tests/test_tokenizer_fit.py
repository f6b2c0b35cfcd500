"""A tokenizer beside a model: of the same ids, whole, decoding as its settings say; anything else is said in a line."""

import json
import logging

import pytest

from hovle_jax.config import ModelConfig
from hovle_jax.conversion.exporting import export_model
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.data.text.fit import check_fit
from hovle_jax.data.text.tokenizer import load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.inference.load import load_run
from tests import micro
from tests.gguf_files import write_gguf
from tests.public_models import change_config, llm, public_folder, random_params
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")
IMAGE = "<IMG_CONTEXT>"


def quiet(_):
    pass


@pytest.fixture
def hovle(tmp_path):
    """A small public HoVLE with the tokenizer of its `micro.VOCAB` ids -> its folder."""
    folder = public_folder(tmp_path, "hovle")
    micro.tokenizer().save(folder)
    change_config(folder, "embedding_config", img_context_token_id=micro.tokenizer().image_id)
    return folder


def refused(folder, message):
    with pytest.raises(UserError, match=message) as raised:
        import_checkpoint(folder, folder.parent / "dst", say=quiet)
    assert "or remove them to import the weights alone" in str(raised.value)
    assert not (folder.parent / "dst").exists()


def test_one_that_fits(hovle):
    import_checkpoint(hovle, hovle.parent / "dst", say=quiet)
    assert load_run(hovle.parent / "dst").tokenizer.vocab_size == micro.VOCAB


def test_one_of_a_larger_vocabulary(tmp_path):
    folder = public_folder(tmp_path, "internlm2")  # of 40 ids
    micro.tokenizer().save(folder)
    refused(folder, r"has ids up to 319 and the model knows 40 ids: it is another model's tokenizer")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (-5, "'<extra>' has the id -5; ids begin at 0"),
        (99_999_999_999, "has the id 99,999,999,999 and only 321 tokens"),
    ],
)
def test_added_ids_that_no_table_has(index, message, hovle):
    (hovle / "added_tokens.json").write_text(json.dumps(micro.tokenizer().added | {"<extra>": index}))
    refused(hovle, message)


def test_another_id_for_images(hovle):
    change_config(hovle, "embedding_config", img_context_token_id=7)
    refused(hovle, rf"has the id {micro.tokenizer().image_id} for '{IMAGE}', the model's config 7")


def test_names_of_the_second_table(tmp_path):
    folder = public_folder(tmp_path, "hovle hd, special tokens, unit output")
    config = json.loads((folder / "config.json").read_text())["embedding_config"]
    assert config["special_token_maps"]
    first = config["llm_vocab_size"]
    added = micro.tokenizer().added
    names = {i: token for token, i in added.items()}
    maps = {names.get(first + i, f"<special {first + i}>"): first + i for i in range(9)}
    change_config(folder, "embedding_config", special_token_maps=maps, img_context_token_id=micro.tokenizer().image_id)
    micro.tokenizer().save(folder)
    import_checkpoint(folder, tmp_path / "whole", say=quiet)
    swapped = dict(zip(maps, reversed(maps.values()), strict=True))
    change_config(folder, "embedding_config", special_token_maps=swapped)
    refused(folder, "the model's config")
    # An LLM taken out of it never meets the image tokens that it does not know.
    change_config(folder, "embedding_config", special_token_maps=maps)
    import_checkpoint(folder, tmp_path / "llm", "llm", say=quiet)
    load_run(tmp_path / "llm")


def test_text_beyond_an_llm_alone_is_not_excused():
    tokenizer = micro.tokenizer()
    image_tokens = len([i for i in tokenizer.added.values() if i >= tokenizer.first_special])
    check_fit(tokenizer, tokenizer.vocab_size - image_tokens, "it", sees_images=False)
    for known, sees in ((tokenizer.vocab_size - image_tokens - 1, False), (tokenizer.vocab_size - 1, True)):
        with pytest.raises(UserError, match="it has ids up to"):
            check_fit(tokenizer, known, "it", sees_images=sees)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.model", b"", "the SentencePiece model is empty"),
        ("tokenizer.model", b"garbage " * 99, "the SentencePiece model is broken"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is not JSON"),
        ("added_tokens.json", b'{"<a>": "x"}', "cannot be read"),
    ],
)
def test_broken_files(name, data, message, hovle):
    (hovle / name).write_bytes(data)
    refused(hovle, message)


def test_a_broken_file_in_a_model_folder(hovle):
    import_checkpoint(hovle, hovle.parent / "dst", say=quiet)
    (hovle.parent / "dst" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="the SentencePiece model is empty"):
        load_run(hovle.parent / "dst")


def test_it_is_checked_again_when_a_model_is_loaded(tmp_path):
    folder = public_folder(tmp_path, "internlm2")
    import_checkpoint(folder, tmp_path / "dst", say=quiet)
    with pytest.raises(UserError, match=r"dst has no tokenizer, so it cannot answer: copy .* or import it again"):
        load_run(tmp_path / "dst")
    micro.tokenizer().save(tmp_path / "dst")
    with pytest.raises(UserError, match=r"dst has ids up to 319 and the model knows 40 ids"):
        load_run(tmp_path / "dst")


def test_weights_alone_come_with_a_warning(tmp_path):
    folder = public_folder(tmp_path, "internlm2")
    result = command("convert", "import", folder, tmp_path / "dst")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "dst has no tokenizer, so it cannot answer" in line
    assert "neither tokenizer.model nor tokenizer.json" in line


def test_a_vocabulary_that_is_not_read_does_not_stop_an_import(tmp_path, caplog):
    def add(writer):
        writer.add_vocab_size(40)
        writer.add_tokenizer_model("llama")  # SentencePiece's scores

    config = llm("llama")
    write_gguf(tmp_path / "model.gguf", config, random_params(ModelConfig(llm=config), "llm"), add)
    with caplog.at_level(logging.WARNING):
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "dst", say=quiet)
    assert "tokenizer.ggml.model='llama' is not supported" in caplog.text
    assert (tmp_path / "dst" / "model" / "llm").is_dir()


@pytest.mark.parametrize("asked", [True, False, None])
def test_blanks_before_punctuation_go_where_the_settings_say_so(asked, hovle):
    settings = {} if asked is None else {"clean_up_tokenization_spaces": asked}
    (hovle / "tokenizer_config.json").write_text(json.dumps(settings))
    import_checkpoint(hovle, hovle.parent / "dst", say=quiet)
    tokenizer = load_tokenizer(hovle.parent / "dst")
    text = "it 's red , is n't it ? I 'm sure ."
    cleaned = "it's red, isn't it? I'm sure."
    for found in (tokenizer, tokenizer.with_image_tokens()):
        assert found.decode(found.encode(text)) == (cleaned if asked else text)


def test_an_export_of_our_own_says_how_it_decodes(tmp_path):
    public_folder(tmp_path, "hovle")
    micro.tokenizer().save(tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "out", say=quiet)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["clean_up_tokenization_spaces"] is False
