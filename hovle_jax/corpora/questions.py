"""Choices that depend on a name alone, and conversations made of questions and answers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

HELD_OUT = 0.1  # the share of concepts and images that belong to the test
T = TypeVar("T")

# Locales as the packages write them, in lower case and with hyphens -> the language's English name.
LANGUAGES = {
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "eo": "Esperanto",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "gl": "Galician",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "ms": "Malay",
    "nb": "Norwegian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "pt-br": "Brazilian Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Simplified Chinese",
    "zh-cn": "Simplified Chinese",
    "zh-hant": "Traditional Chinese",
    "zh-tw": "Traditional Chinese",
}


def fraction(*names: str) -> float:
    """A number in [0, 1) for a name, the same on every machine and whatever other names there are."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_held_out(name: str) -> bool:
    """Whether a concept or an image belongs to the tests."""
    return fraction("held out", name) < HELD_OUT


def pick(options: Sequence[T], *names: str) -> T:
    """One of the options, chosen by name."""
    return options[int(fraction(*names) * len(options))]


def pick_translation(english: str, translations: Mapping[str, str], *names: str) -> tuple[str, str] | None:
    """A language's English name and the text in that language; None if there is no text but the English one."""
    known = {}
    for locale, text in translations.items():
        language = LANGUAGES.get(locale.lower().replace("_", "-"))
        if language and text.casefold() != english.casefold():
            known.setdefault(language, text)
    return pick(sorted(known.items()), "language", *names) if known else None


def conversation(pairs: list[tuple[str, str]], *names: str) -> list[dict[str, str]]:
    """Questions and answers -> an InternVL conversation, with the image before the first question.

    The first answer gives the others away, so the name decides which question comes first: in some conversation each
    kind of question has to be answered from the image.
    """
    first = int(fraction("first question", *names) * len(pairs))
    turns = []
    for question, answer in pairs[first:] + pairs[:first]:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns
