"""Which samples share a row: packing under two budgets, tokens and tiles, from an index of what each sample needs.

Letters: n samples, R rows.
"""

import dataclasses

import numpy as np

WINDOW = 1024  # samples that a row chooses from; few compared with an epoch, so their order stays nearly random


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which samples are in which row.

    Attributes:
      ends: [R] int64; row r holds members[ends[r - 1] : ends[r]].
      members: [n] int32, indices into the list that was packed.
    """

    ends: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> np.ndarray:
        """The members of a row."""
        return self.members[self.ends[index - 1] if index else 0 : self.ends[index]]


def pack(tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, max_samples: int = 0) -> Packing:
    """Packs samples into rows in their order, except that each row chooses within a window.

    A row begins with the sample that has waited longest. Then, as long as one fits, it takes the one whose needs have
    the largest dot product with what is left of the row, both as shares of a row (Panigrahy et al. 2011, "Heuristics
    for vector bin packing"). So the two budgets are used up together.

    Args:
      tokens, tiles: [n] what each sample needs, at most what a row has.
      max_samples: of a row; 0 = as many as fit.
    Returns:
      Packing, in which every sample occurs once.
    """
    tokens, tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    n, size = len(tokens), min(WINDOW, len(tokens))
    members, ends = np.empty(n, np.int32), []
    order = np.arange(size)  # n = an empty slot of the window
    t, m = tokens[:size].copy(), tiles[:size].copy()
    taken, following = 0, size
    token_worth, tile_worth = 1 / max_tokens**2, 1 / max(max_tiles, 1) ** 2
    while taken < n:
        chosen, first = int(order.argmin()), taken
        free_tokens, free_tiles = max_tokens, max_tiles
        while True:
            members[taken] = order[chosen]
            taken += 1
            free_tokens -= t[chosen]
            free_tiles -= m[chosen]
            if following < n:
                order[chosen], t[chosen], m[chosen] = following, tokens[following], tiles[following]
                following += 1
            else:
                order[chosen], t[chosen] = n, max_tokens + 1
            if taken - first == max_samples:
                break
            worth = t * (free_tokens * token_worth) + m * (free_tiles * tile_worth)
            worth[(t > free_tokens) | (m > free_tiles)] = -1
            chosen = int(worth.argmax())
            if worth[chosen] < 0:
                break
        ends.append(taken)
    return Packing(np.asarray(ends, np.int64), members)
