"""The server's routes, as an ASGI application."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Stream
from hovle_jax.serving import page
from hovle_jax.serving.attention import Attention
from hovle_jax.serving.entrance import Entrance, json_of
from hovle_jax.serving.images import Images
from hovle_jax.serving.job import Job
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.protocol import Asked, Reply, logprobs, no_model, parsed
from hovle_jax.serving.worker import Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

SECONDS_BETWEEN_LOOKS = 0.5  # whether the client is still there
OPEN_TO_ALL = (*page.PATHS, "/health")  # without a key


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the text of answer `index`; `end`: how many tokens it had by then."""

    index: int
    text: str
    end: int


@dataclasses.dataclass(frozen=True)
class End:
    """What answer `index` ended with."""

    index: int
    result: Stream | Exception


class Server:
    """What the routes share.

    Args:
      name: the model's, as clients call it.
      token_text: an id -> its text.
      key: clients must send it as a bearer token; empty = none.
    """

    def __init__(self, worker: Worker, name: str, token_text: Callable[[int], str], limits: Limits, key: str = ""):
        self.worker, self.name, self.limits = worker, name, limits
        self._text_of, self._key = token_text, key
        self.entrance, self._started = Entrance(limits), int(time.time())

    def app(self) -> "Starlette":
        """The application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            *page.routes(self.name, self.worker.engine.length),
            Attention(self).route(),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        guarded = [
            Route(route.path, self._guarded(route), methods=sorted(route.methods - {"HEAD"})) for route in routes
        ]
        return Starlette(routes=guarded, exception_handlers={HTTPException: _not_here, Exception: _failed})

    def _guarded(self, route):
        """The route, with refusals as OpenAI's JSON, and closed to those without the key."""
        from starlette.requests import ClientDisconnect

        async def endpoint(request):
            try:
                if route.path not in OPEN_TO_ALL:
                    self._check_key(request)
                return await route.endpoint(request)
            except Refused as refused:
                return _answered(refused)
            except ClientDisconnect:
                return _answered(_gone())

        return endpoint

    def _check_key(self, request):
        given = request.headers.get("authorization", "")
        if self._key and not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Refused(
                401, "no API key, or a wrong one: send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )

    # -- routes

    async def health(self, request: "HTTPRequest") -> "Response":
        """200 while requests are answered at once: the engine is warm and its thread runs."""
        from starlette.responses import JSONResponse

        if not self.worker.is_alive:
            return JSONResponse({"status": "the engine has ended"}, 503)
        if not self.worker.is_ready:
            return JSONResponse({"status": "warming up"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: "HTTPRequest") -> "Response":
        """Prometheus' text format."""
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(self.worker.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: "HTTPRequest") -> "Response":
        """The one model."""
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: "HTTPRequest") -> "Response":
        """The model, by its name."""
        from starlette.responses import JSONResponse

        if (name := request.path_params["name"]) != self.name:
            raise no_model(name, self.name)
        return JSONResponse(self._model())

    def _model(self):
        made = {"id": self.name, "object": "model", "created": self._started, "owned_by": "hovle_jax"}
        return made | {"max_model_len": self.worker.engine.length}

    async def complete(self, request: "HTTPRequest") -> "Response":
        """A chat completion."""
        from starlette.responses import JSONResponse, StreamingResponse

        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        asked, jobs = await self.entrance.prepared(request, lambda body: self._prepared(body, loop, events))
        self.worker.submit(*jobs)
        reply = Reply.of(self.name)
        if not asked.stream:
            streams = await self._awaited(request, jobs, events)
            return JSONResponse(reply.whole(streams, asked, self._text_of))
        first = await self._next(request, jobs, events)  # what fails before the first piece still has a status
        return StreamingResponse(self._sent(reply, asked, jobs, events, first), media_type="text/event-stream")

    def _prepared(self, body, loop, events):
        """Images, tokens and tiles: outside of the event loop, as they take time."""
        asked = parsed(json_of(body), self.limits, Images(self.limits).fetched, self.name)

        def tell(event):
            with contextlib.suppress(RuntimeError):  # the loop has ended: the server did not wait for this answer
                loop.call_soon_threadsafe(events.put_nowait, event)

        jobs = []
        try:
            for index, request in enumerate(asked.requests):
                # Where the tokens end that a piece of text comes from is known when it is made.
                listen = lambda piece, index=index: tell(Piece(index, piece, len(jobs[index].stream.tokens)))
                if jobs:
                    stream = self.worker.engine.another(jobs[0].stream, request.sampling, listen)
                else:
                    stream = self.worker.engine.prepare(asked.prompt, request, listen)
                jobs.append(Job(stream, lambda result, index=index: tell(End(index, result))))
        except UserError as error:
            raise Refused(400, str(error)) from None
        return asked, jobs

    async def _next(self, request, jobs, events):
        """The next event. Raises Refused for one that is an error, or where the client went away: all is cancelled."""
        while True:
            try:
                event = await asyncio.wait_for(events.get(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if await request.is_disconnected():
                    self._cancel(jobs)
                    raise _gone() from None
                continue
            if isinstance(event, End) and isinstance(event.result, Exception):
                self._cancel(jobs)
                raise _refused(event.result)
            return event

    async def _awaited(self, request, jobs, events):
        """The complete answers."""
        ended = {}
        while len(ended) < len(jobs):
            event = await self._next(request, jobs, events)
            if isinstance(event, End):
                ended[event.index] = event.result
        return [ended[index] for index in range(len(jobs))]

    async def _sent(self, reply: Reply, asked: Asked, jobs: list[Job], events: asyncio.Queue, event) -> AsyncIterator:
        """Server-sent events. A client that goes away closes this generator."""
        told, open_answers = [0] * len(jobs), len(jobs)  # tokens whose log-probabilities were sent
        try:
            for index in range(len(jobs)):
                yield _line(reply.piece(asked, index, role="assistant"))
            while True:
                if isinstance(event, End) and isinstance(event.result, Exception):
                    yield _line(_refused(event.result).json())
                    return
                stream = jobs[event.index].stream
                end = event.end if isinstance(event, Piece) else len(stream.tokens)
                more = logprobs(stream, asked, self._text_of, told[event.index], end)
                told[event.index] = end
                if isinstance(event, Piece):
                    yield _line(reply.piece(asked, event.index, event.text, logprobs=more))
                else:
                    open_answers -= 1
                    yield _line(reply.piece(asked, event.index, finish=stream.finish, logprobs=more))
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
    return error if isinstance(error, Refused) else Refused(500, "the engine failed; try again")


def _gone():
    return Refused(499, "the client went away")


def _answered(refused):
    from starlette.responses import JSONResponse

    return JSONResponse(refused.json(), refused.status, refused.headers)


async def _not_here(request, error):
    """No such path, or another method than it has."""
    return _answered(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _failed(request, error):
    """An error of the server's own, which it also logs."""
    return _answered(Refused(500, "the server failed"))
