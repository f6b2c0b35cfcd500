"""An engine for prompts of any length, of which the longest is not known at the beginning."""

from hovle_jax.errors import UserError
from hovle_jax.inference.engine import Engine, Request, Stream
from hovle_jax.inference.generate import Answerer, Prompt, prompt_samples
from hovle_jax.inference.limits import check_lengths

SHORTEST = 1024  # tokens of a prompt with its answer that the first engine is made for


class GrowingEngine:
    """An engine that is replaced by a longer one where a prompt needs it, so that caches are as long as prompts need.

    A longer one has programs of its own, so lengths are doubled; the first prompts come before any program is compiled.

    Args:
      slots, params: see `Engine`.
      length: the least that it is made for.
    """

    def __init__(self, answerer: Answerer, slots: int, params: dict, length: int = SHORTEST):
        self._answerer, self._params, self.num_slots = answerer, params, slots
        self.engine = self._made(length)

    def _made(self, length):
        return Engine(self._answerer, self.num_slots, length, params=self._params)

    def submit(self, prompt: Prompt, request: Request) -> Stream:
        """Queues a prompt. Raises UserError where the model cannot read it."""
        try:
            return self.engine.submit(prompt, request)
        except UserError:
            longer = self._longer(prompt, request)
            if longer <= self.engine.length:
                raise
        self.engine.run()
        del self.engine  # its caches
        self.engine = self._made(longer)
        return self.engine.submit(prompt, request)

    def _longer(self, prompt, request):
        """The length that a refused prompt needs. Raises UserError where the model does not read so much."""
        (sample,) = prompt_samples(self._answerer, [prompt])
        n, llm = len(sample.tokens), self._answerer.hovle.config.llm
        check_lengths(llm, n, request.max_new_tokens, len(sample.tiles))
        return 1 << (n + request.max_new_tokens - 1).bit_length()

    def step(self, prompts_first: bool = False) -> bool:
        """See `Engine.step`."""
        return self.engine.step(prompts_first)
