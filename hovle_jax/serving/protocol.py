"""OpenAI's chat completions: a request's JSON -> what the engine is asked, and its answers -> JSON."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from hovle_jax.data.text.conversation import IMAGE_MARK
from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Request, Stream
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.sampling import Sampling
from hovle_jax.serving.limits import Limits, Refused

MOST_ANSWERS = 16  # n
# Fields that change nothing here, or only what was not asked for.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort"}
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none"
}  # fmt: skip
SAMPLING = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int
}  # fmt: skip
KNOWN = {
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "n", "logprobs",
    "top_logprobs", "response_format", "max_dynamic_patch", *SAMPLING,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A chat completion's request.

    Attributes:
      requests: one for each of its `n` answers.
      usage: whether a stream ends with a chunk of counts.
    """

    prompt: Prompt
    requests: tuple[Request, ...]
    stream: bool = False
    logprobs: bool = False
    usage: bool = False


def parsed(body: Any, limits: Limits, image_of: Callable[[str], Any]) -> Asked:
    """A request's JSON.

    Args:
      image_of: an `image_url`'s URL -> the image.
    Raises:
      Refused: what cannot be done, by the name of its field.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    _check_fields(body)
    prompt = _prompt(body, limits, image_of)
    most = _number(body, "max_completion_tokens", int) or _number(body, "max_tokens", int) or limits.new_tokens
    if most < 1:
        raise Refused(400, f"max_tokens={most}: at least 1")
    count = _number(body, "n", int) or 1
    if not 1 <= count <= MOST_ANSWERS:
        raise Refused(400, f"n={count}: from 1 to {MOST_ANSWERS}")
    sampling = _sampling(body)
    stops = _stops(body)
    requests = tuple(
        Request(min(most, limits.new_tokens), dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**32), stops)
        for i in range(count)
    )
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return Asked(prompt, requests, bool(body.get("stream")), bool(body.get("logprobs")), usage)


def _check_fields(body):
    for name in body.keys() - KNOWN - IGNORED:
        if name not in NEUTRAL or body[name] not in (None, NEUTRAL[name], "auto"):
            raise Refused(400, f"{name} is not supported")
    if body.get("top_logprobs"):
        raise Refused(400, "top_logprobs is not supported; logprobs gives those of the answer's own tokens")
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Refused(400, "response_format: only text is made")


def _number(body, name, kind):
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or kind(value) != value:
        raise Refused(400, f"{name}={value!r}: a number is needed")
    return kind(value)


def _sampling(body):
    numbers = {name: _number(body, name, kind) for name, kind in SAMPLING.items()}
    given: dict[str, Any] = {"temperature": 1.0}
    given |= {name: value for name, value in numbers.items() if value is not None}
    if given.get("top_k") == -1:  # off, as others write it
        given["top_k"] = 0
    if given.get("top_p") == 0:  # the most likely token alone; many of lmms-eval's tasks send it
        given |= {"top_p": 1.0, "temperature": min(given["temperature"], 0.0)}
    if "seed" not in given:
        given["seed"] = uuid.uuid4().int
    given["seed"] %= 2**32
    try:
        return Sampling(**given)
    except UserError as error:
        raise Refused(400, str(error)) from None


def _stops(body):
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise Refused(400, "stop: a text or a list of texts")
    return tuple(stops)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _prompt(body, limits, image_of):
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages: a list of at least one message is needed")
    default = _tiles({"max_dynamic_patch": body.get("max_dynamic_patch")})
    system, turns, images = [], [], []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role == "user":
            text, more = _content(content, default)
            images += more
            if turns and turns[-1][1] is None:  # two in a row are one
                text = f"{turns.pop()[0]}\n{text}"
            turns.append((text, None))
        elif role == "assistant" and turns and turns[-1][1] is None:
            turns[-1] = (turns[-1][0], _text_of(content))
        elif role in ("system", "developer"):
            system.append(_text_of(content))
        else:
            raise Refused(400, f"a message of the role {role!r} is out of place here")
    if not turns or turns[-1][1] is not None:
        raise Refused(400, "messages: the last one must be the user's")
    if len(images) > limits.images:
        raise Refused(413, f"{len(images)} images; at most {limits.images} are read")
    shown = tuple(image_of(url) for url, _ in images)
    return Prompt(tuple(turns), shown, "\n".join(system), tuple(tiles for _, tiles in images))


def _text_of(content):
    text, images = _content(content, None)
    if images:
        raise Refused(400, "images belong into the user's messages")
    return text


def _content(content, default):
    """A message's content -> (text with a mark for each image, [(url, max tiles or None)])."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(400, "content: a text or a list of parts")
    parts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif part.get("type") == "image_url":
            images.append(_image(part.get("image_url"), default))
            parts.append(None)
        else:
            raise Refused(400, f"a part of the type {part.get('type')!r} cannot be read")
    return _marked(parts), images


def _marked(parts):
    """Texts and images (None) as one text. Marks that the texts have already are the images' places; images after all
    texts go in front, as the model has seen them in training."""
    texts = [part for part in parts if part is not None]
    count = len(parts) - len(texts)
    if not count or sum(text.count(IMAGE_MARK) for text in texts) == count:
        return "\n".join(texts)
    if parts[: len(texts)] == texts:
        parts = parts[len(texts) :] + texts
    return "\n".join(IMAGE_MARK if part is None else part for part in parts)


def _image(image, default):
    image = {"url": image} if isinstance(image, str) else image
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise Refused(400, "image_url: a url is needed")
    return image["url"], _tiles(image) or default


def _tiles(image):
    """The most tiles of an image: `max_dynamic_patch`, or 1 for `detail: low`; None = the model's own."""
    tiles = _number(image, "max_dynamic_patch", int)
    if tiles is not None and tiles < 1:
        raise Refused(400, f"max_dynamic_patch={tiles}: at least 1")
    if image.get("detail") not in (None, "auto", "low", "high"):
        raise Refused(400, f"detail={image['detail']!r}: auto, low or high")
    return 1 if tiles is None and image.get("detail") == "low" else tiles


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True)
class Reply:
    """What all parts of a reply have in common: its id, its time and the model's name."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, model: str) -> "Reply":
        return cls(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model)

    def _json(self, kind, choices, **more):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def whole(self, streams: Sequence[Stream], asked: Asked, tokens_of: Callable[[int], str]) -> dict:
        """The answers, complete."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": stream.text},
                "logprobs": _logprobs(stream, tokens_of) if asked.logprobs else None,
                "finish_reason": stream.finish,
            }
            for index, stream in enumerate(streams)
        ]
        return self._json("chat.completion", choices, usage=usage(streams))

    def piece(self, index: int, text: str = "", role: str = "", finish: str | None = None) -> dict:
        """A part of an answer that is streamed."""
        delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._json("chat.completion.chunk", [choice])

    def counts(self, streams: Sequence[Stream]) -> dict:
        """The last chunk where counts were asked for."""
        return self._json("chat.completion.chunk", [], usage=usage(streams))


def usage(streams: Sequence[Stream]) -> dict:
    """Tokens read and made; answers to one prompt count it once."""
    read, made = streams[0].reading.length, sum(len(stream.tokens) for stream in streams)
    cached = {"cached_tokens": streams[0].reused}
    return {
        "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made, "prompt_tokens_details": cached
    }  # fmt: skip


def _logprobs(stream, tokens_of):
    rows = [
        {"token": tokens_of(token), "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(stream.tokens, stream.logprobs)
        if token not in stream.stop_ids
    ]
    return {"content": rows}
