"""Text of strangers (names of files, rows, answers) as it may be shown: it never steers a terminal."""

import re

# Control characters (ESC begins a terminal's commands), what turns the direction of writing, further ends of lines,
# and lone surrogates, which no file can hold.
_HIDDEN = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_HIDDEN}]")
_IN_LINES = re.compile(f"(?![\n\t])[{_HIDDEN}]")


def printable(text: object, lines: bool = False) -> str:
    """The text with each control character, and what else is not seen but acts, as its escape: ESC becomes `\\x1b`.

    Args:
      lines: ends of lines and tabs stay, as in an answer that is printed.
    """
    pattern = _IN_LINES if lines else _IN_A_LINE
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
