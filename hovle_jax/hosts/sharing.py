"""Items that hosts share: each does every n-th, and host 0 gets what all have made of them, in order.

Results travel through the key-value store of jax.distributed, so that no file system need be shared.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from hovle_jax.hosts import distributed

T = TypeVar("T")


def made_together(items: Sequence[T], make: Callable[[Sequence[T]], Iterable[Any]]) -> Iterator[Any]:
    """What all hosts make of items, in order, on host 0; on the others nothing comes out. Every host goes through it.

    Args:
      items: the same on all hosts.
      make: this host's share -> a JSON value other than null for each, in order.
    """
    if not distributed.several():
        yield from make(items)
        return
    relay = _Relay()
    mine = range(jax.process_index(), len(items), jax.process_count())
    own = zip(mine, make([items[i] for i in mine]), strict=True)
    if distributed.is_leader():
        yield from _all_in_order(own, len(items), relay)
    else:
        for number, value in own:
            relay.hand(number, value)


def _all_in_order(own, total, relay):
    """Host 0 goes on with its own share while it waits for another's."""
    made, at = {}, 0
    for number, value in own:
        made[number] = value
        while at < total and (found := made.pop(at) if at in made else relay.take_if_there(at)) is not None:
            yield found
            at += 1
    for number in range(at, total):
        yield made.pop(number) if number in made else relay.take(number)


class _Relay:
    """Values that hosts hand to host 0, by number."""

    def __init__(self):
        self._client, self._folder = distributed._client(), f"hovle_jax/{distributed._once('shared')}"

    def hand(self, number, value):
        self._client.key_value_set(f"{self._folder}/{number}", json.dumps(value))

    def take(self, number):
        return self._taken(number, self._client.blocking_key_value_get(f"{self._folder}/{number}", distributed.WAIT_MS))

    def take_if_there(self, number):
        try:
            text = self._client.key_value_try_get(f"{self._folder}/{number}")
        except jax.errors.JaxRuntimeError:  # it is not
            return None
        return self._taken(number, text)

    def _taken(self, number, text):
        self._client.key_value_delete(f"{self._folder}/{number}")
        return json.loads(text)
