"""What may be wrong with the files of a tokenizer, in one line instead of a library's own error."""

import contextlib
import json
from collections.abc import Collection, Iterator

from hovle_jax.errors import UserError

MOST_UNUSED = 2**16  # ids without a token; public vocabularies have hundreds
MOST_GROWTH = 1000  # of a text, by the steps before its split into tokens; public tokenizers have 2


@contextlib.contextmanager
def readable(what: str, remedy: str) -> Iterator[None]:
    """Any error inside, of which the libraries raise many kinds, becomes a UserError: WHAT (the error); REMEDY."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise UserError(f"{what} ({str(error) or type(error).__name__}); {remedy}") from None


def check_ids(ids: Collection[int], others: int = 0) -> None:
    """Raises UserError for an id that no vocabulary of so many tokens has, or that is no integer.

    The library fills all ids up to the largest when it writes a tokenizer: one id of 2^32 would take all memory.

    Args:
      others: how many tokens there are besides.
    """
    wrong = [i for i in ids if type(i) is not int]
    if wrong:
        raise UserError(f"the tokenizer has the id {wrong[0]!r}, which is no integer")
    count = len(ids) + others
    if max(ids, default=0) > 2 * count + MOST_UNUSED:
        raise UserError(f"the tokenizer has the id {max(ids):,} and only {count:,} tokens")


def check_growth(text: str) -> None:
    """Raises UserError for a tokenizer.json whose steps make a short text endless: 50 times ByteLevel double it each.

    Args:
      text: the file's content, a JSON object.
    """
    content = json.loads(text)
    growth = 1
    for part in ("normalizer", "pre_tokenizer"):
        for step in _steps(content.get(part)):
            if step.get("type") == "ByteLevel":
                growth *= 2
            if step.get("type") == "Replace":
                growth *= max(1, len(step.get("content") or ""))
    if growth > MOST_GROWTH:
        raise UserError(f"its steps make a text up to {growth:,} times as long; {MOST_GROWTH:,} are possible")


def _steps(part):
    """All objects inside a part of the file."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from _steps(value)
    if isinstance(part, list):
        for value in part:
            yield from _steps(value)
