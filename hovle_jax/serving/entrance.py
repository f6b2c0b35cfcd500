"""The way in: bodies are received and made ready for the engine, so many at once and no more."""

import asyncio
import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hovle_jax.serving.limits import Limits, Refused

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest


class Entrance:
    """What is between the network and the engine's queue. Its methods are called in the event loop.

    Bodies are held in memory until their images are decoded, which is done by few threads: both have limits, beyond
    which a request is refused at once.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._threads = concurrent.futures.ThreadPoolExecutor(limits.threads, thread_name_prefix="prepare")
        self._bytes = self._preparing = 0

    async def prepared(self, request: "HTTPRequest", prepare: Callable[[bytes], Any]) -> Any:
        """What `prepare` makes of a request's body, in one of the threads.

        Raises:
          Refused: the body is too large (413) or too slow (408), or too much is on its way already (503, 429).
        """
        body = bytearray()
        with self._held() as hold:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    async for part in request.stream():
                        hold(len(part))
                        body += part
                        if len(body) > self._limits.body_bytes:
                            raise Refused(413, f"the body has more than {self._limits.body_bytes:,} bytes")
            except TimeoutError:
                raise Refused(408, f"the body did not come within {self._limits.body_seconds:g} seconds") from None
            return await self._in_thread(prepare, bytes(body))

    async def _in_thread(self, prepare, body):
        if self._preparing >= self._limits.preparing:
            raise Refused(429, f"{self._preparing} requests are being read already; try again later")
        self._preparing += 1
        # A client that goes away does not end the thread, so the thread's end is what counts.
        made = asyncio.get_running_loop().run_in_executor(self._threads, prepare, body)
        made.add_done_callback(self._left)
        return await asyncio.shield(made)

    def _left(self, made):
        self._preparing -= 1
        if not made.cancelled():
            made.exception()  # looked at, if by nobody else

    @contextlib.contextmanager
    def _held(self) -> Iterator[Callable[[int], None]]:
        """Counts the bytes of one body among all that are held."""
        mine = 0

        def hold(count):
            nonlocal mine
            if self._bytes + count > self._limits.held_bytes:
                raise Refused(503, "too many bytes are being received already; try again later")
            mine += count
            self._bytes += count

        try:
            yield hold
        finally:
            self._bytes -= mine


def json_of(body: bytes) -> Any:
    """A request's JSON. Raises Refused where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
