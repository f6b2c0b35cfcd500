"""Items in lists of a few."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many of them; the last may be shorter (itertools.batched is new in Python 3.12)."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part
