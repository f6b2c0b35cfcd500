"""Rows as people keep them (InternVL, LLaVA, chat messages, captions, questions, text) -> one kind of record.

A row is a dict, from a jsonl line, a tar sample or a Parquet row. It is checked here, once.
"""

import dataclasses
from typing import Any

from hovle_jax.data import images
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import image_paths
from hovle_jax.data.text.chat_template import IMAGE_MARK

HUMAN, MODEL = ("human", "user"), ("gpt", "assistant", "model")
IMAGE_KEYS = ("image", "images", "jpg", "png", "webp", "img")
CAPTION_KEYS = ("captions", "caption", "text", "txt", "TEXT", "prompt")
CLASS_KEYS = ("label", "cls", "class", "fine_label")  # where rows of public sets have the class of their image
UNSUPPORTED = ("video", "videos", "audio")


@dataclasses.dataclass(frozen=True)
class Record:
    """A sample in the one form that the rest of the code reads.

    Attributes:
      images: encoded images (bytes) or their paths (str), in the order of their marks.
      sizes: ((width, height), ...) if the row states them; empty = read them from the images.
      turns: ((question, answer), ...); empty if there is no conversation.
      system: the system message; empty = the run's own.
      captions: descriptions of the first image.
      text: plain text.
      references: for each turn all answers that are right, the learned one among them.
      options: the texts of a multiple choice, A first.
      root, outside_root: what the paths of images may be (see `image_paths`).
    """

    images: tuple = ()
    sizes: tuple = ()
    turns: tuple = ()
    system: str = ""
    captions: tuple[str, ...] = ()
    text: str = ""
    references: tuple = ()
    options: tuple = ()
    root: str = ""
    outside_root: bool = False

    @property
    def caption(self) -> str:
        """The first description; empty where there is none."""
        return self.captions[0] if self.captions else ""

    def image_bytes(self, index: int) -> bytes:
        """An encoded image. Raises BadSample if its file is missing or cannot be read."""
        image = self.images[index]
        if not isinstance(image, str):
            return image
        try:
            return image_paths.read(image, self.root, self.outside_root)
        except BadSample as error:
            raise BadSample(error.reason.replace("file", "image"), error.detail) from None


def parse(row: object, root: str = "", outside_root: bool = False) -> Record:
    """A row -> Record. Raises BadSample with a reason.

    Args:
      row: a dict with `conversations` or `messages`, `question` and `answer`, a caption, or a text; and `image`. One
        question may have several `answers`, and `options` (or `choices`).
      root: the folder that image paths are relative to, and below which they stay.
      outside_root: image paths may lead elsewhere.
    """
    if not isinstance(row, dict):
        raise BadSample("not_a_row", f"a {type(row).__name__} instead of an object with keys")
    for key in UNSUPPORTED:
        if row.get(key):
            raise BadSample("unsupported", f"it has {key!r}, which is not read")
    encoded = _images(row, root, outside_root)
    captions = _captions(row, bool(encoded))
    if row.get("conversations") is not None:
        system, turns = _turns(row["conversations"], "from", "value")
    elif row.get("messages") is not None:
        system, turns = _turns(row["messages"], "role", "content")
    else:
        system, turns = "", _questions(row)
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if turns and marks != len(encoded) and (marks or not encoded):
        raise BadSample("wrong_marks", f"{marks} {IMAGE_MARK} marks and {len(encoded)} images")
    text = row.get("text") if not encoded else None
    if text is not None and not isinstance(text, str):
        raise BadSample("not_text", f"'text' is a {type(text).__name__}")
    sizes = _sizes(row, len(encoded))
    said = (turns, system, captions, _valid(text or ""), _references(row, turns), _options(row))
    record = Record(encoded, sizes, *said, root, outside_root)
    if not (record.images or record.turns or record.caption or record.text.strip()):
        raise BadSample(
            "empty_row", f"neither images nor text under any known key; it has {', '.join(map(str, row))}"[:200]
        )
    return record


def _images(row, root, outside_root):
    # An empty path means no image: InternVL's rows of text alone are written so.
    value = next((row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "")), ())
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(_image(value, root, outside_root) for value in values)


def _image(value, root, outside_root):
    if isinstance(value, dict):  # as datasets of the Hugging Face hub keep images in Parquet
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise BadSample("wrong_image_field", f"an image is given as {type(value).__name__} {str(value)[:40]!r}")
    return image_paths.named(_valid(value), root, outside_root)


def _sizes(row, count):
    """The stated sizes, if there is a plausible one for each image; else ()."""
    sides = []
    for key in ("width", "height"):
        value = row.get(key, row.get(f"{key}_list"))  # the second is InternVL's name for several images
        sides.append(value if isinstance(value, (list, tuple)) else [value])
    pairs = list(zip(*sides))
    plausible = all(type(w) is type(h) is int and min(w, h) > 0 and w * h <= images.MAX_PIXELS for w, h in pairs)
    return tuple(map(tuple, pairs)) if plausible and count and len(sides[0]) == len(sides[1]) == count else ()


def _valid(text):
    """The text. Raises BadSample if it has lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample("not_unicode", error) from None
    return text


def _captions(row, has_images):
    keys = CAPTION_KEYS if has_images else ("caption",)
    found = (_texts(row.get(key)) for key in keys)
    return next((texts for texts in found if texts), ())


def _texts(value):
    """The texts of a field that is one, or a list of them; what is no text counts as absent."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text for text in (_valid(v).strip() for v in values if isinstance(v, str)) if text)


def _turns(messages, role_key, text_key):
    """A list of messages -> (system message, ((question, answer), ...))."""
    if isinstance(messages, dict) and all(isinstance(values, (list, tuple)) for values in messages.values()):
        # TFDS and the hub's Sequence turn a list of dicts into a dict of lists.
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if not isinstance(messages, (list, tuple)):
        raise BadSample("wrong_conversation", f"it is a {type(messages).__name__} instead of a list")
    system, spoken = "", []
    for message in messages:
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise BadSample("wrong_conversation", f"a message without {role_key!r} and {text_key!r}")
        role, text = message[role_key], _message_text(message[text_key])
        if role == "system" and not spoken:
            system = text
        elif role in (*HUMAN, *MODEL):
            spoken.append((role in HUMAN, text))
        else:
            raise BadSample("wrong_roles", f"the role {str(role)[:40]!r} where human or gpt is expected")
    if not spoken:
        raise BadSample("empty_conversation", "it has no turn")
    if len(spoken) % 2 or any(is_human != (i % 2 == 0) for i, (is_human, _) in enumerate(spoken)):
        raise BadSample("wrong_roles", "human and gpt do not alternate, from a question to an answer")
    turns = tuple((question, answer) for (_, question), (_, answer) in zip(spoken[::2], spoken[1::2]))
    return system.strip(), _answered(turns)


def _message_text(value):
    """A message's text; of a list of parts, as chat interfaces have it, the images become marks."""
    if isinstance(value, (list, tuple)):
        parts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image", "image_url"):
                raise BadSample("wrong_conversation", f"a part of the type {kind!r}")
            parts.append(part.get("text") if kind == "text" else IMAGE_MARK)
        value = "\n".join(parts) if all(isinstance(p, str) for p in parts) else None
    if not isinstance(value, str):
        raise BadSample("not_text", f"a message is a {type(value).__name__}")
    return _valid(value)


def _answered(turns):
    if not all(answer.strip() for _, answer in turns):
        raise BadSample("empty_answer", "an answer has no text, so there is nothing to learn from it")
    return turns


def _questions(row):
    """`question` and `answer`, or lists of them under `questions` and `answers`."""
    questions = row.get("questions", row.get("question"))
    answers = row.get("answers", row.get("answer"))
    if questions is None or answers is None:
        return ()
    several = lambda value: list(value) if isinstance(value, (list, tuple)) else [value]
    # A single question may have several answers; the first one is learned.
    one = not isinstance(questions, (list, tuple))
    questions, answers = several(questions), [_answer(value) for value in several(answers)[: 1 if one else None]]
    pairs = list(zip(questions, answers))
    if not pairs or len(questions) != len(answers):
        raise BadSample("wrong_questions", f"it has {len(questions)} questions and {len(answers)} answers")
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise BadSample("not_text", "a question or an answer is no text")
    return _answered(tuple((_valid(question), _valid(answer)) for question, answer in pairs))


def _answer(value):
    """An answer's text; VQAv2 has an object for each person who was asked."""
    return value.get("answer") if isinstance(value, dict) else value


def _references(row: dict, turns: tuple) -> tuple:
    """The right answers of each turn: of a single one all that are under `answers`."""
    several = row.get("answers")
    if len(turns) == 1 and isinstance(several, (list, tuple)):
        texts = tuple(text for text in map(_answer, several) if isinstance(text, str))
        if texts:
            return (texts,)
    return tuple((answer,) for _, answer in turns)


def _options(row: dict) -> tuple:
    """`options` or `choices`: a list, or a dict of letters."""
    options = row.get("options", row.get("choices"))
    options = list(options.values()) if isinstance(options, dict) else options
    return tuple(map(str, options)) if isinstance(options, (list, tuple)) else ()


def class_text(value: Any) -> str | None:
    """A class as rows have it (a text, a number, a list of one) -> a text; None if it is none."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int)):
        return " ".join(str(value).split()) or None
    return None


def sizes_of(record: Record, upright: bool = True, max_pixels: int = images.MAX_PIXELS) -> tuple:
    """((width, height), ...) of a record's images, as its row states them, else from headers. Raises BadSample."""
    if record.sizes or not record.images:
        return record.sizes
    return tuple(images.image_size(record.image_bytes(i), upright, max_pixels) for i in range(len(record.images)))
