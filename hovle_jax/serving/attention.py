"""Where the model looked while it gave an answer: an endpoint of our own beside OpenAI's.

It takes the JSON of a chat completion whose last message is the assistant's, and gives the tiles and how much each of
their visual tokens was attended to.
"""

import asyncio
import base64
import dataclasses
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.inference.attention_maps import AttentionMaps, passage, watch
from hovle_jax.inference.engine import Request, Stream
from hovle_jax.serving.entrance import json_of
from hovle_jax.serving.images import Images
from hovle_jax.serving.job import Job
from hovle_jax.serving.limits import Refused
from hovle_jax.serving.protocol import parsed

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response
    from starlette.routing import Route

PATH = "/v1/attention"
MOST_TOKENS = 32  # of an answer, that have a map of their own
DIGITS = 6  # of a weight
SECONDS_BETWEEN_LOOKS = 0.5  # whether the client is still there


class Attention:
    """The endpoint; `server` is `app.Server`, whose worker and limits it shares.

    A request waits in the queue as any other, for one token of an answer: by then the prompt has been found to fit. Its
    maps are then made in the engine's thread, between two steps.
    """

    def __init__(self, server: Any):
        self._server = server

    def route(self) -> "Route":
        from starlette.routing import Route

        return Route(PATH, self.look, methods=["POST"])

    async def look(self, request: "HTTPRequest") -> "Response":
        """The maps of a conversation's last answer."""
        from starlette.responses import JSONResponse

        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def tell(result):
            loop.call_soon_threadsafe(lambda: ended.done() or ended.set_result(result))

        job = await self._server.entrance.prepared(request, lambda body: self._prepared(json_of(body), tell))
        self._server.worker.submit(job)
        result = await self._awaited(request, job, ended)
        if isinstance(result, Refused):
            raise result
        if not isinstance(result, AttentionMaps):
            raise Refused(500, "the engine failed; try again", "server_error")
        return JSONResponse(await asyncio.to_thread(as_json, result, self._server.name))

    async def _awaited(self, request, job, ended):
        while True:
            try:
                return await asyncio.wait_for(asyncio.shield(ended), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if await request.is_disconnected():
                    self._server.worker.cancel(job)
                    raise Refused(499, "the client went away") from None

    def _prepared(self, body, tell):
        """Images, tokens and tiles: outside of the event loop, as they take time."""
        engine, limits = self._server.worker.engine, self._server.limits
        asking, answer, layers = _split(body)
        prompt = parsed(asking, limits, Images(limits).fetched, self._server.name).prompt
        if not engine.answerer.params:
            raise Refused(501, "this server was started with --noattention, without the weights that it takes")
        try:
            what = passage(engine.answerer, prompt, answer, layers)
            if len(what.sample.tokens) > engine.length:
                raise UserError(
                    f"prompt and answer have {len(what.sample.tokens):,} tokens: the engine was made for "
                    f"{engine.length:,}"
                )
            stream = engine.prepare(prompt, Request(1))
        except UserError as error:
            raise Refused(400, str(error)) from None
        return Job(stream, lambda result: tell(_looked(engine.answerer, what, result)))


def _looked(answerer, what, result):
    """Called in the engine's thread. Whatever goes wrong is this request's alone."""
    if not isinstance(result, Stream) or result.finish == "cancelled":
        return result
    try:
        return watch(answerer, what)
    except Exception as error:  # noqa: BLE001 (it would end what the engine is answering)
        return error


def _split(body):
    """-> (what was asked, as of a chat completion; the answer; layers counted from 0, or None)."""
    messages: Any = body.get("messages") if isinstance(body, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise Refused(400, "messages: the last one must be the assistant's, a text: the answer that is looked at")
    layers = body.get("layers")
    if layers is not None and not (isinstance(layers, list) and layers and all(type(x) is int for x in layers)):
        raise Refused(400, f"layers={layers!r}: a list of layers of the LLM, counted from 1")
    asking = {name: value for name, value in body.items() if name != "layers"} | {"messages": messages[:-1]}
    return asking, last["content"], layers and [layer - 1 for layer in layers]


def as_json(maps: AttentionMaps, model: str) -> dict:
    """What is sent.

    `tiles` are PNG data URLs, one image's after another's, as `images` counts them. A layer's `answer` is [M][g * g],
    row after row: the mean over the answer's tokens of what each visual token of a tile was given; its `tokens` are the
    same for each of `tokens`, the first of the answer.
    """
    rows = maps.of_answer  # [layers, A, M, g, g]
    flat = rows.reshape(*rows.shape[:3], -1)
    texts = maps.texts[maps.answer :][:MOST_TOKENS]
    rounded = lambda x: np.round(x.astype(np.float64), DIGITS).tolist()
    layers = [
        {
            "layer": layer + 1,
            "sparsity": round(float(maps.sparsity[i]), DIGITS),
            "image_share": round(float(maps.image_share[i]), DIGITS),
            "answer": rounded(flat[i].mean(0)),
            "tokens": rounded(flat[i, : len(texts)]),
        }
        for i, layer in enumerate(maps.layers)
    ]
    return {
        "object": "attention",
        "model": model,
        "num_layers": maps.num_layers,
        "grid": rows.shape[-1],
        "images": [dataclasses.asdict(image) for image in maps.images],
        "tiles": [_png(tile) for tile in maps.tiles],
        "tokens": list(texts),
        "layers": layers,
    }


def _png(tile):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(tile).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
