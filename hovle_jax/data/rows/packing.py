"""Which samples share a row: two budgets, tokens and tiles, filled from an index of what each sample needs.

Letters: n samples, R rows.
"""

import dataclasses

import numpy as np

WINDOW = 1024  # samples among which a row finds its own; few against an epoch, so their order stays nearly random


@dataclasses.dataclass(frozen=True)
class Packing:
    """Rows of samples.

    Attributes:
      ends: [R] int64; row r holds members[ends[r - 1] : ends[r]].
      members: [n] int32, places in the list that was packed.
    """

    ends: np.ndarray
    members: np.ndarray

    def __len__(self):
        return len(self.ends)

    def row(self, index):
        return self.members[self.ends[index - 1] if index else 0 : self.ends[index]]


def pack(tokens, tiles, max_tokens, max_tiles, max_samples=0):
    """Puts samples into rows, in their order but for a window in which each row chooses.

    A row begins with the sample that has waited longest. Then, while one fits, it takes the one whose needs point most
    in the direction of what is left: the largest dot product of the two, both as shares of a row (Panigrahy et al.
    2011, "Heuristics for vector bin packing"). So neither budget is used up while the other is open.

    Args:
      tokens, tiles: [n] what each sample needs; none more than a row has.
      max_samples: of a row; 0 = as many as fit.
    Returns:
      Packing, in which every sample is once.
    """
    tokens, tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    n, size = len(tokens), min(WINDOW, len(tokens))
    members, ends = np.empty(n, np.int32), []
    order = np.arange(size)  # n = an empty place
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
