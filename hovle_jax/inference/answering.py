"""A model that answers, as notebooks and commands use it; `hovle_jax.load` makes one."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from hovle_jax.data.images import load_image
from hovle_jax.data.text.conversation import IMAGE_MARK
from hovle_jax.inference.caches import kind_for
from hovle_jax.inference.engine import Engine, Request, slots_bytes
from hovle_jax.inference.generate import Prompt
from hovle_jax.inference.limits import longest
from hovle_jax.inference.load import Loaded, find_run
from hovle_jax.inference.memory import SLOTS, Budget, Weights
from hovle_jax.inference.sampling import Sampling
from hovle_jax.inference.slots import fused
from hovle_jax.system.memory import free_on

SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


def request_of(max_new_tokens: int = 64, stop: str | Sequence[str] = (), **sampling: Any) -> Request:
    """A request from keywords: those of `Sampling`, and

    Args:
      max_new_tokens: the longest answer.
      stop: a text, or several, that end the answer and are not part of it.
    """
    unknown = sampling.keys() - SAMPLING
    if unknown:
        raise TypeError(f"unknown options {', '.join(sorted(unknown))}; known are {', '.join(sorted(SAMPLING))}")
    return Request(max_new_tokens, Sampling(**sampling), (stop,) if isinstance(stop, str) else tuple(stop))


def opened(images: Any) -> tuple:
    """One image or several: paths, Pillow images or arrays [H, W, 3] uint8."""
    several = images if isinstance(images, (list, tuple)) else (images,)
    return tuple(load_image(x) if isinstance(x, (str, os.PathLike)) else x for x in several)


class AnsweringModel:
    """A model with an engine.

        model = hovle_jax.load("runs/instruct")
        print(model.answer("what color is the shape?", images=["photo.png"]))
        for piece in model.stream("what is in the image?", images=["photo.png"]):
            print(piece, end="", flush=True)

    Options of every method are those of `request_of`; without any the most likely tokens are taken.
    """

    def __init__(
        self,
        loaded: Loaded,
        slots: int = SLOTS,
        length: int | None = None,
        int8: bool = False,
        keep: bool = False,
        cache: str = "",
    ):
        """Makes the engine.

        Args:
          slots: prompts that are answered at once.
          length: the most tokens of a prompt with its answer.
          int8: weights in int8.
          keep: keep the parameters of `loaded` beside the engine's own, as attention maps need them; else they are
            deleted.
          cache: see `Engine`.
        """
        self.loaded = loaded if keep else dataclasses.replace(loaded, params={})
        hovle = loaded.models.hovle
        params, tokens = fused(loaded.params, hovle, int8, consume=not keep), longest(hovle.config.llm, length)
        self.engine = Engine(self.loaded.answerer, slots, tokens, params=params, cache=cache)

    @classmethod
    def of_folder(
        cls,
        folder: str | os.PathLike,
        max_tiles: int | None = None,
        slots: int | None = None,
        length: int | None = None,
        dtype: str = "",
        keep: bool = False,
        cache: str = "",
    ) -> "AnsweringModel":
        """Of a finished run or an import. Whether there is room is known before its weights are read.

        Arguments and errors: those of `hovle_jax.load`.
        """
        int8 = dtype == "int8"
        found = find_run(folder, dtype="" if int8 else dtype)
        config, hovle = found.models.config, found.models.hovle
        weights, tokens = Weights.of(config, hovle, int8, keep), longest(hovle.config.llm, length)
        taken = lambda slots, length: slots_bytes(hovle, slots, length, cache=kind_for(cache, int8))
        slots = Budget(free_on(jax.local_devices()), taken, weights).slots(slots, tokens)
        return cls(found.read().with_max_tiles(max_tiles), slots, length, int8, keep, cache)

    def answer(
        self, prompt: str | Sequence[str], images: Any = (), system: str = "", **options: Any
    ) -> str | list[str]:
        """The answer to a prompt about images; to a list of prompts, all about these images, a list of answers.

        Each `<image>` in a prompt takes one image, in order; without any mark they come first.
        Raises UserError where marks and images disagree or the prompt is too long.
        """
        shown, request = opened(images), request_of(**options)
        asked = [prompt] if isinstance(prompt, str) else prompt
        streams = [self.engine.submit(Prompt(((text, None),), shown, system), request) for text in asked]
        self.engine.run()
        texts = [stream.text for stream in streams]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, images: Any = (), system: str = "", **options: Any) -> Iterator[str]:
        """The pieces of an answer as they are made; an iterator that is closed early cancels it."""
        return self._pieces(Prompt(((prompt, None),), opened(images), system), request_of(**options))

    def _pieces(self, prompt: Prompt, request: Request) -> Iterator[str]:
        pieces: collections.deque[str] = collections.deque()
        stream = self.engine.submit(prompt, request, pieces.append)
        try:
            while pieces or not stream.finish:
                if pieces:
                    yield pieces.popleft()
                else:
                    self.engine.step()
        finally:
            self.engine.cancel(stream)

    def chat(self, system: str = "", **options: Any) -> "Chat":
        """A conversation that remembers its turns and images. `options` hold for all of its answers."""
        return Chat(self, system, request_of(**options))


class Chat:
    """A conversation; `turns` is ((question, answer), ...) so far and `images` those of all turns.

    chat = model.chat()
    chat.say("what is it?", images=["photo.png"])
    chat.say("and its color?")
    """

    def __init__(self, model: AnsweringModel, system: str, request: Request):
        self._model, self._system, self._request = model, system, request
        self.turns: tuple[tuple[str, str], ...] = ()
        self.images: tuple = ()

    def say(self, text: str, images: Any = ()) -> str:
        """The answer to what is said next."""
        return "".join(self.stream(text, images)).strip()

    def stream(self, text: str, images: Any = ()) -> Iterator[str]:
        """The pieces of the answer; the turn is remembered when all were taken."""
        shown = opened(images)
        if shown and IMAGE_MARK not in text:
            text = (IMAGE_MARK + "\n") * len(shown) + text  # unmarked, all images would go to the first turn
        prompt = Prompt((*self.turns, (text, None)), (*self.images, *shown), self._system)
        said = ""
        for piece in self._model._pieces(prompt, self._request):
            said += piece
            yield piece
        self.turns, self.images = (*self.turns, (text, said)), (*self.images, *shown)
