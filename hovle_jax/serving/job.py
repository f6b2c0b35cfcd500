"""A request on its way."""

import dataclasses
import time
from collections.abc import Callable

from hovle_jax.inference.engine import Stream


@dataclasses.dataclass
class Job:
    """A request on its way.

    Attributes:
      stream: as `Engine.prepare` made it.
      on_end: called once in the worker's thread, with the Stream, or with the exception that ended it.
      first: when its first text was made.
      failure: what ends it in place of an answer.
    """

    stream: Stream
    on_end: Callable[[Stream | Exception], None]
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    first: float = 0.0
    failure: Exception | None = None
    is_cancelled: bool = False
