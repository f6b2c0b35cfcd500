"""OpenAI's chat completions: a request's JSON -> what the engine is asked, and its answers -> JSON."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Request, Stream
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.sampling import Sampling
from hovle_jax.inference.slots import MOST_TOPS
from hovle_jax.inference.texts import BROKEN
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.messages import number, prompt_of

MOST_ANSWERS = 16  # n
MOST_STOPS, LONGEST_STOP = 16, 256
# Fields of OpenAI's that change nothing here: they say who asks, what is kept, or how fast an answer is to come.
IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity", "prediction",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# Those that would change an answer, and the value with which they do not.
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
    "functions": [], "function_call": "none", "modalities": ["text"], "audio": None, "web_search_options": None,
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
      requests: one for each of its `n` answers; they differ in their seeds alone.
      logprobs: whether those of the answer's tokens are told.
      usage: whether a stream ends with a chunk of counts.
    """

    prompt: Prompt
    requests: tuple[Request, ...]
    stream: bool = False
    logprobs: bool = False
    usage: bool = False


def parsed(body: Any, limits: Limits, image_of: Callable[[str], Any], model: str = "") -> Asked:
    """A request's JSON.

    Args:
      image_of: an `image_url`'s URL -> the image.
      model: the name of the one that answers; empty = any.
    Raises:
      Refused: what cannot be done, by the name of its field.
    """
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    _check_fields(body, model)
    request, count = _request(body, limits), number(body, "n", int, least=1, most=MOST_ANSWERS)
    stream, usage = _flag(body, "stream"), _usage(body)
    logprobs = _flag(body, "logprobs")
    # Last, as it decodes the images.
    prompt = prompt_of(body, limits, image_of)
    requests = tuple(_drawn_again(request, i) for i in range(1 if count is None else count))
    return Asked(prompt, requests, stream, logprobs, usage)


def _request(body, limits):
    """What all answers have in common. Clients ask for more than a prompt leaves, so an answer may have just that."""
    wanted = number(body, "max_completion_tokens", int, least=1)
    if wanted is None:
        wanted = number(body, "max_tokens", int, least=1)
    most = min(wanted or limits.new_tokens, limits.new_tokens)
    return Request(most, _sampling(body), _stops(body), top_logprobs=_top_logprobs(body), may_be_shorter=True)


def _drawn_again(request, index):
    seed = (request.sampling.seed + index) % 2**32
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))


def _check_fields(body, model):
    for name in body.keys() - KNOWN - IGNORED:
        if name not in NEUTRAL:
            raise Refused(400, f"{name} is not supported: there is no such field here", name, "unknown_parameter")
        if body[name] not in (None, NEUTRAL[name], "auto"):
            raise Refused(400, f"{name} is not supported", name, "unsupported_parameter")
    asked = body.get("model")
    if model and asked not in (None, "", model):
        raise no_model(asked, model)
    kind = body.get("response_format") or {"type": "text"}
    kind = kind.get("type") if isinstance(kind, dict) else kind
    if kind != "text":
        raise Refused(400, f"response_format: only text is made, not {kind!r}", "response_format")


def no_model(asked: Any, name: str) -> Refused:
    """What a request gets that names another model than the one that answers."""
    return Refused(404, f"the model {asked!r} does not exist here; it is {name!r}", "model", "model_not_found")


def _usage(body):
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise Refused(400, "stream_options: an object is needed", "stream_options")
    if not body.get("stream"):
        raise Refused(400, "stream_options: only with stream", "stream_options")
    return _flag(options, "include_usage")


def _top_logprobs(body):
    count = number(body, "top_logprobs", int, least=0, most=MOST_TOPS) or 0
    if count and not body.get("logprobs"):
        raise Refused(400, "top_logprobs: only with logprobs", "top_logprobs")
    return count


def _flag(body, name):
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refused(400, f"{name}={value!r}: true or false", name)
    return bool(value)


def _sampling(body):
    numbers = {name: number(body, name, kind) for name, kind in SAMPLING.items()}
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
        raise Refused(400, "stop: a text or a list of texts", "stop")
    if len(stops) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stops):
        raise Refused(400, f"stop: at most {MOST_STOPS} texts of {LONGEST_STOP} characters", "stop")
    return tuple(stops)


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
                "logprobs": logprobs(stream, asked, tokens_of),
                "finish_reason": stream.finish,
            }
            for index, stream in enumerate(streams)
        ]
        return self._json("chat.completion", choices, usage=usage(streams))

    def piece(
        self,
        asked: Asked,
        index: int,
        text: str = "",
        role: str = "",
        finish: str | None = None,
        logprobs: dict | None = None,
    ) -> dict:
        """A part of an answer that is streamed."""
        delta = ({"role": role} if role else {}) | ({"content": text} if text or role else {})
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        # Where counts were asked for, all chunks have the field.
        return self._json("chat.completion.chunk", [choice], **({"usage": None} if asked.usage else {}))

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


def logprobs(
    stream: Stream, asked: Asked, tokens_of: Callable[[int], str], start: int = 0, end: int | None = None
) -> dict | None:
    """Of an answer's tokens from `start` to before `end`, without the one that only ends it; None if not asked for."""
    if not asked.logprobs:
        return None
    rows = []
    for i in range(start, len(stream.tokens) if end is None else end):
        if stream.tokens[i] in stream.stop_ids:
            continue
        tops = [_logprob(tokens_of(token), value) for token, value in stream.tops[i]]
        rows.append(_logprob(tokens_of(stream.tokens[i]), stream.logprobs[i]) | {"top_logprobs": tops})
    return {"content": rows}


def _logprob(text, value):
    """A part of a character has no bytes of its own in this form."""
    return {"token": text, "logprob": value, "bytes": None if BROKEN in text else list(text.encode())}
