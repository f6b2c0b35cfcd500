"""Choices that depend on nothing but a name, and conversations made of questions and answers."""

import hashlib

HELD_OUT = 0.1

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


def fraction(*names):
    """A number in [0, 1) for a name: the same on every machine, and in whatever order the names come."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_held_out(name):
    """Whether a concept or a picture belongs to the tests."""
    return fraction("held out", name) < HELD_OUT


def pick(options, *names):
    """One of the options, by name."""
    return options[int(fraction(*names) * len(options))]


def pick_translation(english, translations, *names):
    """A language's English name and the text in it, or None: one that we have a name for and that is not English."""
    known = {}
    for locale, text in translations.items():
        language = LANGUAGES.get(locale.lower().replace("_", "-"))
        if language and text.casefold() != english.casefold():
            known.setdefault(language, text)
    return pick(sorted(known.items()), "language", *names) if known else None


def conversation(pairs, *names):
    """Questions and answers -> an InternVL conversation, the picture in front of its first question.

    The first answer gives the others away, so which of the questions comes first depends on the name: each kind has
    to be answered from the picture somewhere.
    """
    first = int(fraction("first question", *names) * len(pairs))
    turns = []
    for question, answer in pairs[first:] + pairs[:first]:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns
