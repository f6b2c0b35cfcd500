"""Tokenizers: SentencePiece models, Hugging Face's tokenizer.json, and the BPE inside a GGUF, behind one interface.

Special tokens are never parsed out of a user's text: `encode` treats them as ordinary characters. Only a chat template
adds them, as ids.
"""

import collections
import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hovle_jax.data.text.broken import check_growth, check_ids, readable
from hovle_jax.data.text.cleaning import CLEANERS
from hovle_jax.errors import UserError
from hovle_jax.system.files import reason_of, write_json, write_whole

# At the top of the vocabulary, in the order of the public checkpoints (InternLM2: 92542 to 92552).
ADDED_TOKENS = (
    "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>",
    "</box>",
)  # fmt: skip
UNUSED_NAMES = {"<|im_end|>": "[UNUSED_TOKEN_145]", "<|im_start|>": "[UNUSED_TOKEN_146]"}  # InternLM2's pieces
IMAGE_TOKEN = "<IMG_CONTEXT>"
IMAGE_TOKENS = ("<img>", "</img>", IMAGE_TOKEN)
SETTINGS = "tokenizer_settings.json"  # beside a tokenizer: settings that its own file lacks
# What public tokenizers with `clean_up_tokenization_spaces` replace by what, one after another.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
CAPTION_PIECES = "spiece.model"  # the file of `CaptionPieces`
FILES = (CAPTION_PIECES, "tokenizer.model", "tokenizer.json")  # one of which a folder with a tokenizer has
BRING_BACK = "bring its files back, as from the run or the model that this one started from"
CHAT_TEMPLATE = "chat_template.jinja"  # beside a tokenizer: its chat template; without this file, InternLM2's is used


class Tokenizer:
    """The interface of all tokenizers.

    Attributes:
      vocab_size: number of ids.
      first_special: the first of the special ids at the top of the vocabulary; ids below it are text.
      bos, eos: ids; bos may be None.
      stop_ids: the ids that end an answer.
      chat_template: Jinja source; None = InternLM2's, which is built in.
      clean_up: whether decoding removes blanks before punctuation, as some public tokenizers do.
      pad: the id that fills a row after a caption; None = the model's config says it.
    """

    vocab_size: int
    first_special: int
    bos: int | None
    eos: int
    stop_ids: tuple[int, ...]
    chat_template: str | None = None
    clean_up: bool = False
    pad: int | None = None

    def __init__(self, special: Mapping[str, int]):
        """special: {token: id}."""
        self._special = dict(special)
        self._names = {i: token for token, i in self._special.items()}

    @property
    def image_id(self) -> int:
        """The id of `IMAGE_TOKEN`."""
        return self.special(IMAGE_TOKEN)

    @property
    def specials(self) -> dict[str, int]:
        """{token: id} of all special tokens."""
        return dict(self._special)

    def special(self, token: str) -> int:
        """The id of a special token. Raises UserError if there is none of this name."""
        if token not in self._special:
            raise UserError(f"the tokenizer has no special token {token!r}; it has {', '.join(sorted(self._special))}")
        return self._special[token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it are ordinary characters."""
        raise NotImplementedError

    def encode_adjacent(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of adjacent texts, encoded as one text.

        Returns:
          (ids, the index of the text that each id belongs to: the last one that it reaches into).
        """
        ids, ends = self._encode_with_ends("".join(texts))
        if ends is None:
            pairs = [(i, index) for index, text in enumerate(texts) for i in self.encode(text)]
            return [i for i, _ in pairs], [index for _, index in pairs]
        bounds = list(itertools.accumulate(map(len, texts)))
        return ids, np.searchsorted(bounds, ends).tolist()

    def _encode_with_ends(self, text):
        """-> (ids, the number of characters up to the end of each; None if that is unknown)."""
        raise NotImplementedError

    def _decode_text(self, ids):
        raise NotImplementedError

    def _piece(self, index):
        raise NotImplementedError

    def save(self, folder: pathlib.Path) -> None:
        """Writes the files that `load_tokenizer` reads."""
        self._save(folder)
        settings = self._settings() | ({"clean_up": True} if self.clean_up else {})
        if settings:
            write_whole(folder / SETTINGS, json.dumps(settings) + "\n")
        if self.chat_template is not None:
            write_whole(folder / CHAT_TEMPLATE, self.chat_template)

    def _save(self, folder):
        raise NotImplementedError

    def _settings(self):
        """Settings that the tokenizer's own file lacks."""
        return {}

    def with_image_tokens(self) -> "Tokenizer":
        """A tokenizer that also knows <img>, </img> and <IMG_CONTEXT>; new ids follow all others."""
        new = [token for token in IMAGE_TOKENS if token not in self._special]
        if not new:
            return self
        with readable("the tokenizer cannot take the tokens of images", "give a model whose tokenizer is whole"):
            more = self._with_special(new)
        more.chat_template, more.clean_up = self.chat_template, self.clean_up
        return more

    def _with_special(self, tokens):
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out, or written by name. Ids without a piece are left out."""
        texts = []
        for special, run in itertools.groupby(map(int, ids), key=lambda i: i in self._names):
            if not special:
                texts.append(self._decode_text([i for i in run if i < self.vocab_size]))
            elif not skip_special:
                texts.extend(self._names[i] for i in run)
        text = "".join(texts)
        for untidy, cleaner in CLEAN_UP if self.clean_up else ():
            text = text.replace(untidy, cleaner)
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id's own piece, for display: ['▁a', '▁blue', '<img>', ...]."""
        return [self._names.get(i) or (self._piece(i) if i < self.vocab_size else f"<id {i}>") for i in map(int, ids)]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Chat and image tokens follow its own ids or, as in InternLM2, replace unused pieces.

    Args:
      model: the model file's bytes.
      added: {token: id} besides the model's pieces; None = ADDED_TOKENS as in InternLM2: in place of the pieces
        `UNUSED_NAMES` if the model has them, the others after its ids.
    Raises:
      UserError: `model` is not a SentencePiece model.
    """

    bos, eos = 1, 2

    def __init__(self, model: bytes, added: Mapping[str, int] | None = None):
        import sentencepiece

        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
        except RuntimeError:
            self._pieces = None
        if self._pieces is None:
            raise UserError(f"the SentencePiece model is {'broken' if model else 'empty'}; fetch the file again")
        size = self._pieces.vocab_size()
        added = self._usual_added() if added is None else dict(added)
        check_ids(added.values(), size)
        super().__init__(added | {"<s>": self.bos, "</s>": self.eos})
        self.added = added
        self.first_special = min([size, *added.values()])
        self.vocab_size = max([size - 1, *added.values()]) + 1
        self.stop_ids = tuple(self._special[token] for token in ("<|im_end|>", "</s>") if token in self._special)

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Trains a BPE model with byte fallback on `lines`; `vocab_size` includes the added tokens.

        Raises:
          UserError: there is too little text for so many pieces.
        """
        import sentencepiece

        lines, out = list(lines), io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=out,
                model_type="bpe",
                vocab_size=vocab_size - len(ADDED_TOKENS),
                byte_fallback=True,
                character_coverage=_coverage(lines, vocab_size // 4),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                normalization_rule_name="identity",
                user_defined_symbols=["\n"],  # a boundary: a role's header never merges with the text after it
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:  # too little text for so many pieces, or so few for 256 bytes
            raise UserError(
                f"no tokenizer of tokenizer.vocab_size={vocab_size} can be trained on {len(lines)} lines of text: "
                f"{error}; change the size, or give a tokenizer with tokenizer.path"
            ) from None
        return cls(out.getvalue())

    def encode(self, text: str) -> list[int]:
        ids = self._pieces.encode(text)
        if self._names.keys().isdisjoint(ids):
            return ids
        # A special token's id may also be a piece of the model (InternLM2: '[UNUSED_TOKEN_145]'). If a user writes that
        # piece, its bytes are encoded instead.
        return [i for index in ids for i in (self._bytes(index) if index in self._names else [index])]

    @property
    def adds_prefix(self) -> bool:
        """Whether the model puts a blank in front of each text."""
        return self._pieces.encode("a", out_type=str)[0].startswith("\u2581")

    @functools.cached_property
    def _lengths(self):
        """[pieces] int32: how many bytes of text each piece stands for."""
        sizes = [
            1 if self._pieces.is_byte(i) else len(self._pieces.id_to_piece(i).replace("\u2581", " ").encode())
            for i in range(self._pieces.vocab_size())
        ]
        return np.asarray(sizes, np.int32)

    def _encode_with_ends(self, text):
        ids, data = self.encode(text), text.encode()
        ends = np.cumsum(self._lengths[ids], dtype=np.int64) if ids else np.zeros(0, np.int64)
        prefix = (int(ends[-1]) if ids else 0) - len(data)
        if prefix not in (
            0,
            1,
        ):  # a blank may be added in front; if a model changes the text otherwise, the ends are unknown
            return ids, None
        begun = np.cumsum(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)  # characters up to and including each byte's
        return ids, np.append(0, begun)[np.maximum(ends - prefix, 0)].tolist()

    def _bytes(self, index):
        text = self._pieces.id_to_piece(index).replace("\u2581", " ")
        return [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def _decode_text(self, ids):
        return self._pieces.decode([i for i in ids if i < self._pieces.vocab_size()])

    def _piece(self, index):
        return self._pieces.id_to_piece(index) if index < self._pieces.vocab_size() else f"<id {index}>"

    def _usual_added(self):
        pieces, size = self._pieces, self._pieces.vocab_size()
        ids = {token: pieces.piece_to_id(name) for token, name in UNUSED_NAMES.items()}
        inside = {token: i for token, i in ids.items() if not pieces.is_unknown(i)}
        others = [token for token in ADDED_TOKENS if token not in inside]
        return inside | {token: size + i for i, token in enumerate(others)}

    def _with_special(self, tokens):
        return SentencePieceTokenizer(self.model, self.added | {t: self.vocab_size + i for i, t in enumerate(tokens)})

    def _save(self, folder):
        """Writes tokenizer.model, and added_tokens.json if the added tokens have unusual ids."""
        write_whole(folder / "tokenizer.model", self.model)
        if self.added != self._usual_added():
            write_json(folder / "added_tokens.json", self.added)


class CaptionPieces(SentencePieceTokenizer):
    """SigLIP's SentencePiece model: captions are cleaned first, and end with its own end token; nothing begins them.

    Args:
      model: the model file's bytes.
    """

    def __init__(self, model: bytes):
        super().__init__(model, {})
        self.bos, self.eos = None, self._pieces.eos_id()
        if self.eos < 0:
            raise UserError("the SentencePiece model has no end token: it is not SigLIP's")
        self._special = {self._pieces.id_to_piece(self.eos): self.eos}
        self._names = {i: token for token, i in self._special.items()}
        self.vocab_size = self.first_special = self._pieces.vocab_size()
        self.stop_ids, self.pad = (self.eos,), self.eos

    def encode(self, text: str) -> list[int]:
        return [i for i in self._pieces.encode(CLEANERS["siglip"](text)) if i != self.eos]

    def _encode_with_ends(self, text):
        return self.encode(text), None

    def _with_special(self, tokens):
        raise UserError("a tokenizer of captions has no tokens of images")

    def _save(self, folder):
        write_whole(folder / CAPTION_PIECES, self.model)


def _coverage(lines, most):
    """The share of the text that its `most` frequent characters make up; the others are encoded as bytes."""
    counts = collections.Counter(itertools.chain.from_iterable(lines))
    if len(counts) <= most:
        return 1.0
    return sum(count for _, count in counts.most_common(most)) / counts.total()


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` library (extra `convert`).

    Args:
      text: the file's content.
      bos: a token's name or None.
      stops: names of the tokens that end an answer, the end-of-sequence token first.
      clean: of `cleaning.CLEANERS`: what is done to a text first.
    Raises:
      UserError: an id that no vocabulary of so many tokens has; the library raises anything where the file is broken.
    """

    def __init__(self, text: str, bos: str | None = None, stops: Sequence[str] = (), clean: str = ""):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(
                'reading tokenizer.json needs the package tokenizers; run: pip install "hovle_jax[convert]"'
            ) from None
        check_growth(text)
        self.text, self.settings = text, {"bos": bos, "stops": list(stops)} | ({"clean": clean} if clean else {})
        if clean not in CLEANERS:
            raise UserError(f"{clean!r} is no way to clean a text; there are {', '.join(filter(None, CLEANERS))}")
        self._clean = CLEANERS[clean]
        self._model = tokenizers.Tokenizer.from_str(text)
        # A file may ask for texts of a fixed number of ids, such as 2^40.
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # as ordinary text
        added = self._model.get_added_tokens_decoder()
        super().__init__({token.content: i for i, token in added.items() if token.special})
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        check_ids(vocabulary.values())
        # Small ids may be special too (SmolLM2's 0 to 16); only those in the upper half count as "at the top".
        self.first_special = min([i for i in self._names if i >= self.vocab_size // 2], default=self.vocab_size)
        self.bos = None if bos is None else self.special(bos)
        self.stop_ids = tuple(self.special(token) for token in stops)
        self.eos = self.stop_ids[0] if self.stop_ids else -1

    def encode(self, text: str) -> list[int]:
        return self._model.encode(self._clean(text), add_special_tokens=False).ids

    def _encode_with_ends(self, text):
        if self._clean is not CLEANERS[""]:
            return self.encode(text), None
        encoded = self._model.encode(text, add_special_tokens=False)
        return encoded.ids, [end for _, end in encoded.offsets]

    def _decode_text(self, ids):
        return self._model.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """The id of any token, special or not; None if there is none."""
        return self._model.token_to_id(token)

    def _piece(self, index):
        return self._model.id_to_token(index) or f"<id {index}>"

    def _with_special(self, tokens):
        import tokenizers

        model = tokenizers.Tokenizer.from_str(self.text)
        model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
        return HuggingFaceTokenizer(model.to_str(), **self.settings)

    def _save(self, folder):
        write_whole(folder / "tokenizer.json", self.text)

    def _settings(self):
        return self.settings


def load_tokenizer(place: str | os.PathLike) -> Tokenizer:
    """A tokenizer, with its chat template, from a folder, or one without from a SentencePiece file.

    Raises:
      UserError: there is none, or one of its files is broken.
    """
    place = pathlib.Path(place)
    if not place.is_file() and not has_tokenizer(place):
        raise UserError(f"no tokenizer at {place}; point tokenizer.path at a SentencePiece model")
    with readable(f"the tokenizer in {place} cannot be read", BRING_BACK):
        tokenizer = _sentence_pieces(place) if place.is_file() else _load_folder(place)
        try_out(tokenizer)
    return tokenizer


def _load_folder(place):
    settings = _object(place / SETTINGS) or {}
    clean_up = settings.pop("clean_up", False)
    if (place / CAPTION_PIECES).is_file():
        with _naming(place / CAPTION_PIECES) as path:
            tokenizer = CaptionPieces(path.read_bytes())
    elif (place / "tokenizer.model").is_file():
        tokenizer = _sentence_pieces(place / "tokenizer.model", _object(place / "added_tokens.json"))
    else:
        with _naming(place / "tokenizer.json") as path:
            tokenizer = HuggingFaceTokenizer(path.read_text("utf-8"), **settings)
    tokenizer.clean_up = clean_up
    if (place / CHAT_TEMPLATE).is_file():
        with _naming(place / CHAT_TEMPLATE) as path:
            tokenizer.chat_template = path.read_text("utf-8")
    return tokenizer


def try_out(tokenizer: Tokenizer) -> None:
    """Encodes and decodes a few words: some broken files are noticed at the first use."""
    for text in ("", "A few words, 12.", "é\n東"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        tokenizer.encode_adjacent([text, text])
    tokenizer.decode(range(min(3, tokenizer.vocab_size)), skip_special=False)


def _sentence_pieces(path, added=None):
    with _naming(path):
        return SentencePieceTokenizer(path.read_bytes(), added)


def _object(path):
    """The JSON object in a file beside a tokenizer; None without the file."""
    if not path.is_file():
        return None
    with _naming(path):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise UserError("no object")
        return found


@contextlib.contextmanager
def _naming(path):
    """What goes wrong inside is put down to a file: the libraries raise plain errors of many kinds."""
    try:
        yield path
    except Exception as error:
        raise UserError(f"{path.name}: {reason_of(error)}") from None


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether `load_tokenizer` finds one in this folder."""
    return any((pathlib.Path(folder) / name).is_file() for name in FILES)
