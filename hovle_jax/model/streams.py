"""The sequences of a batch: the short stream that the LLM reads and, for HD, the long one of the embedding's layers.

On the device a batch is a dict of arrays (the batch contract in data/batch.py). Here alone is written which of its
fields belong to which stream.
"""

import dataclasses
from typing import Any

LONG = "long_"  # before the names of the long stream's fields


@dataclasses.dataclass(frozen=True)
class Stream:
    """A packed sequence that layers run over: arrays of the host or the device, or their shapes.

    Attributes:
      tokens: [..., L] int32 ids; a visual token has the id of <IMG_CONTEXT>.
      positions: [..., L] int32, from 0 in each segment.
      segment_ids: [..., L] int32; 0 = padding.
      image_positions: [..., M * P] int32, where each visual token of the tiles stands; L = nowhere. None where a batch
        has no tiles.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    image_positions: Any = None

    @classmethod
    def of(cls, batch: dict, long: bool = False) -> "Stream":
        """The short or the long stream of a batch."""
        prefix = LONG if long else ""
        return cls(**{name: batch.get(prefix + name) for name in NAMES})

    def fields(self, long: bool = False) -> dict:
        """The fields of a batch that it is, by name."""
        prefix = LONG if long else ""
        values = {prefix + name: getattr(self, name) for name in NAMES}
        return {name: value for name, value in values.items() if value is not None}


NAMES = tuple(field.name for field in dataclasses.fields(Stream))


def embedding_stream(batch: dict) -> Stream:
    """The stream that the embedding's layers run over: the long one where the batch has one."""
    return Stream.of(batch, long=LONG + NAMES[0] in batch)
