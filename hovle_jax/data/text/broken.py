"""What may be wrong with the files of a tokenizer, in one line instead of a library's own error."""

import contextlib
from collections.abc import Collection, Iterator

from hovle_jax.errors import UserError

MOST_UNUSED = 2**16  # ids without a token; public vocabularies have hundreds


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
