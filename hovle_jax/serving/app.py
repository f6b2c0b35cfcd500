"""The server's routes, as an ASGI application."""

import asyncio
import hmac
import importlib.resources
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Stream
from hovle_jax.serving.images import fetched
from hovle_jax.serving.job import Job
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.protocol import Asked, Reply, parsed
from hovle_jax.serving.worker import Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

SECONDS_BETWEEN_LOOKS = 0.5  # whether the client is still there
OPEN_TO_ALL = ("/", "/health")  # without a key


class Server:
    """What the routes share.

    Args:
      name: the model's, as clients call it.
      token_text: an id -> its text.
      key: clients must send it as a bearer token; empty = none.
    """

    def __init__(self, worker: Worker, name: str, token_text: Any, limits: Limits, key: str = ""):
        self.worker, self.name, self.limits = worker, name, limits
        self._token_text, self._key = token_text, key

    def app(self) -> "Starlette":
        """The application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        return Starlette(routes=[self._guarded(route) for route in routes])

    def _guarded(self, route):
        """The route, with refusals as OpenAI's JSON, and closed to those without the key."""
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def endpoint(request):
            try:
                if route.path not in OPEN_TO_ALL:
                    self._check_key(request)
                return await route.endpoint(request)
            except Refused as refused:
                return JSONResponse(_error(refused), refused.status)

        return Route(route.path, endpoint, methods=sorted(route.methods - {"HEAD"}))

    def _check_key(self, request):
        given = request.headers.get("authorization", "")
        if self._key and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Refused(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")

    # -- routes

    async def page(self, request: "HTTPRequest") -> "Response":
        """A page to ask from."""
        from starlette.responses import HTMLResponse

        page = importlib.resources.files("hovle_jax.serving").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(page.replace("{{model}}", self.name))

    async def health(self, request: "HTTPRequest") -> "Response":
        """200 while the engine's thread runs."""
        from starlette.responses import JSONResponse

        alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def metrics(self, request: "HTTPRequest") -> "Response":
        """Prometheus' text format."""
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(self.worker.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: "HTTPRequest") -> "Response":
        """The one model."""
        from starlette.responses import JSONResponse

        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "hovle_jax"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": self.worker.engine.length}]})

    async def complete(self, request: "HTTPRequest") -> "Response":
        """A chat completion."""
        from starlette.responses import JSONResponse, StreamingResponse

        body = await self._body(request)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        asked, jobs = await asyncio.to_thread(self._prepared, body, loop, events)
        submitted = []
        try:
            for job in jobs:
                self.worker.submit(job)
                submitted.append(job)
        except Refused:
            self._cancel(submitted)
            raise
        reply = Reply.of(self.name)
        if asked.stream:
            first = await events.get()  # what fails before the first piece still has a status
            if isinstance(first[1], Exception):
                self._cancel(jobs)
                raise _refused(first[1])
            return StreamingResponse(self._sent(reply, asked, jobs, events, first), media_type="text/event-stream")
        streams = await self._awaited(request, jobs, events)
        return JSONResponse(reply.whole(streams, asked, self._token_text))

    async def _body(self, request):
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.limits.body_bytes:
                raise Refused(413, f"the body has more than {self.limits.body_bytes:,} bytes")
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None

    def _prepared(self, body, loop, events):
        """Images, tokens and tiles: outside of the event loop, as they take time."""
        asked = parsed(body, self.limits, lambda url: fetched(url, self.limits))
        tell = lambda index, event: loop.call_soon_threadsafe(events.put_nowait, (index, event))
        jobs = []
        try:
            for index, request in enumerate(asked.requests):
                listen = lambda piece, index=index: tell(index, piece)
                stream = self.worker.engine.prepare(asked.prompt, request, listen, shorten=True)
                jobs.append(Job(stream, lambda result, index=index: tell(index, result)))
        except UserError as error:
            raise Refused(400, str(error)) from None
        return asked, jobs

    async def _awaited(self, request, jobs, events):
        """The complete answers; those of a client that went away are cancelled."""
        ended = {}
        while len(ended) < len(jobs):
            try:
                index, event = await asyncio.wait_for(events.get(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if await request.is_disconnected():
                    self._cancel(jobs)
                    raise Refused(499, "the client went away") from None
                continue
            if isinstance(event, Exception):
                self._cancel(jobs)
                raise _refused(event)
            if isinstance(event, Stream):
                ended[index] = event
        return [ended[index] for index in range(len(jobs))]

    async def _sent(self, reply: Reply, asked: Asked, jobs: list[Job], events: asyncio.Queue, event) -> AsyncIterator:
        """Server-sent events. A client that goes away closes this generator."""
        open_answers = len(jobs)
        try:
            for index in range(len(jobs)):
                yield _line(reply.piece(index, role="assistant"))
            while True:
                index, what = event
                if isinstance(what, Exception):
                    yield _line(_error(_refused(what)))
                    return
                if isinstance(what, str):
                    yield _line(reply.piece(index, what))
                else:
                    open_answers -= 1
                    yield _line(reply.piece(index, finish=what.finish))
                if not open_answers:
                    break
                event = await events.get()
            if asked.usage:
                yield _line(reply.counts([job.stream for job in jobs]))
            yield "data: [DONE]\n\n"
        finally:
            self._cancel(jobs)

    def _cancel(self, jobs):
        for job in jobs:
            self.worker.cancel(job)


def _line(value):
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _refused(error):
    return error if isinstance(error, Refused) else Refused(500, "the engine failed; try again", "server_error")


def _error(refused):
    return {"error": {"message": str(refused), "type": refused.kind, "param": None, "code": refused.status}}
