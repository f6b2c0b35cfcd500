"""A model of lmms-eval in its own process, without a server.

lmms-eval finds it by `lmms_eval_plugin.py`. Questions are read by the server's own protocol, so that both ways give the
same answers.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.inference.answering import opened
from hovle_jax.inference.engine import Stream
from hovle_jax.inference.many import in_order
from hovle_jax.inference.memory import SLOTS
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.lmms_eval_plugin import CLASS, NAME
from hovle_jax.serving.protocol import Asked, parsed
from hovle_jax.system.progress import track

NEW_TOKENS = 1024  # where a task names none, as lmms-eval's own clients do
# lmms-eval gives this stop to tasks that name none, and its clients and most of its models drop it: answers in
# paragraphs would be cut.
INJECTED_STOP = "\n\n"
LIMITS = Limits(images=2**20, new_tokens=2**31)
# Of other models' preprocessing.
IGNORED = {"image_aspect_ratio", "use_cache", "modalities"}


def __getattr__(name: str) -> Any:
    """lmms-eval takes the class by its name; lmms-eval itself is imported no sooner."""
    if f"{__name__}.{name}" == CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class():
    from lmms_eval.api.model import lmms

    return type(CLASS.split(".")[-1], (Answers, lmms), {"__module__": __name__})


class Answers:
    """What lmms-eval calls, without its base class.

    Attributes:
      task_dict: {task: {split: rows}}; lmms-eval fills it.
    """

    is_simple = False  # it is given messages rather than a text and its images
    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str = "",
        max_tiles: int | None = None,
        length: int | None = None,
        dtype: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ):
        """The arguments of --model_args, then lmms-eval's own flags.

        Args:
          pretrained: as the `name` of `hovle_jax.load`, which has `max_tiles`, `length` and `dtype` too.
          batch_size: questions that are answered at once; fewer than 8 are 8.
        Raises:
          UserError: an argument that is unknown or cannot be honoured.
        """
        super().__init__()
        if unknown:
            known = "pretrained, max_tiles, length, dtype"
            raise UserError(f"--model_args: unknown {', '.join(sorted(unknown))}; known are {known}")
        if not pretrained:
            raise UserError("--model_args: name the model, as pretrained=runs/instruct")
        if device:
            raise UserError(f"--device {device} is PyTorch's; leave it out: JAX takes the devices that it finds")
        if not str(batch_size).isdecimal():
            raise UserError(f"--batch_size {batch_size}: give a number")
        slots = max(SLOTS, int(batch_size))
        self._model = hovle_jax.load(pretrained, max_tiles=max_tiles, slots=slots, length=length, dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to lmms-eval's requests, in their order.

        A question that the model cannot read, as one that is too long, has an empty answer and is told on stderr.

        Args:
          requests: with `args` = (context, row -> messages, generation kwargs, row's number, task, split).
        Raises:
          UserError: generation kwargs that cannot be honoured, before anything is answered.
        """
        for options in [request.args[2] for request in requests]:
            _parsed([{"role": "user", "content": "?"}], options)
        failed = []

        def submit(request):
            try:
                return self._submit(request)
            except UserError as error:
                failed.append(f"{request.args[4]} row {request.args[3]}: {error}")
                return ""

        answered = in_order(self._model.engine, requests, submit)
        texts = [text for _, text in track(answered, _say, "answers", "questions", len(requests))]
        if failed:
            _say(f"{len(failed)} of {len(requests)} questions could not be asked; their answers are empty: {failed[0]}")
        return texts

    def _submit(self, request) -> Stream:
        _, messages_of, options, number, task, split = request.args
        asked = _parsed(messages_of(self.task_dict[task][split][number]), options)
        engine = self._model.engine
        return engine.enqueue(engine.prepare(asked.prompt, asked.requests[0]))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: only answers are made. Raises UserError."""
        raise UserError(f"{NAME} has no loglikelihood: take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Refused. Raises UserError."""
        raise UserError(f"{NAME} has no generate_until_multi_round: take a task whose output_type is generate_until")


def _parsed(messages: Sequence[dict], options: dict) -> Asked:
    """lmms-eval's messages and generation kwargs, read as the server reads a request's JSON."""
    images = []
    turns = [{**message, "content": _content(message["content"], images)} for message in messages]
    try:
        return parsed({"messages": turns, **_fields(options)}, LIMITS, lambda place: images[int(place)])
    except Refused as error:
        raise UserError(str(error)) from None


def _content(content, images):
    """A message's content in OpenAI's form; an image's URL is its place in `images`, to which it is added."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") == "image":
            parts.append({"type": "image_url", "image_url": {"url": str(len(images))}})
            images.append(_rgb(part["url"]))
        else:
            parts.append(part)
    return parts


def _rgb(image):
    (image,) = opened(image)
    return image.convert("RGB") if hasattr(image, "convert") else image


def _fields(options):
    """Generation kwargs, as Hugging Face's transformers names them -> the fields of a request's JSON.

    What would change an answer and is not offered keeps its name, by which it is refused.
    """
    left = {name: value for name, value in options.items() if name not in IGNORED and value is not None}
    stops = left.pop("until", [])
    stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop and stop != INJECTED_STOP]
    if left.get("num_beams") == 1:
        del left["num_beams"]
    heat = left.pop("temperature", None)
    draws = left.pop("do_sample", bool(heat))
    temperature = (1.0 if heat is None else heat) if draws else 0.0
    if not temperature:
        left = {name: value for name, value in left.items() if name not in ("top_p", "top_k", "min_p")}
    most = left.pop("max_new_tokens", NEW_TOKENS)
    return {"max_tokens": most, "temperature": temperature, "seed": 0, "stop": stops} | left


def _say(line):
    print(line, file=sys.stderr, flush=True)
