"""How many programs this process has compiled: what works in a steady state compiles none."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@functools.cache
def _counter() -> list[int]:
    counted = [0]

    def listen(event, duration_secs, **_):
        if event == _EVENT:
            counted[0] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counted


def count() -> int:
    """Programs compiled since this was first called, which gave 0."""
    return _counter()[0]
