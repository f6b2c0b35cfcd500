"""The text of an answer while it is made: whole characters, and nothing of a stop string.

Each token costs the same, however long the answer is: only the last tokens are decoded again, which also hold what a
decoder needs before a token (a blank that is left out in front of a text, the other bytes of a character).
"""

from collections.abc import Sequence

from hovle_jax.data.text.tokenizer import CLEAN_UP, Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for a character whose bytes are not all there
CONTEXT = 8  # tokens that are decoded before new ones
WINDOW = 4 * CONTEXT  # tokens decoded at once, beyond which all but the context is let go
LONGEST_WINDOW = 16 * WINDOW  # also where nothing but broken characters would be let go
TIDIED = max(len(untidy) for untidy, _ in CLEAN_UP)  # characters in which cleaning up may still change something


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text, its blank in front too; a special token's name; `BROKEN` for part of a character."""
    before = tokenizer.encode("a")[-1:]
    both, alone = (tokenizer.decode(ids, skip_special=False) for ids in ([*before, token], before))
    return both[len(alone) :] if both.startswith(alone) else tokenizer.decode([token], skip_special=False)


class TextSoFar:
    """Tokens in, pieces of text out.

    Attributes:
      is_stopped: whether a stop string was met; it and what follows are not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stop for stop in stops if stop)
        self._window: list[int] = []  # the last tokens
        self._used = 0  # characters of the window's text that are in `_pending` or were given out
        self._pending = ""  # decoded for good, but an answer may end before it
        self._given: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._given)

    def add(self, token: int) -> str:
        """What can be said after one more token: without what may yet become another character or a stop string."""
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        self._use(decoded[: len(decoded) - self._unfinished(decoded)])
        if len(self._window) >= WINDOW:
            self._let_go(decoded)
        return self._give(held_back=True)

    def end(self) -> str:
        """What was held back."""
        self._use(self._tokenizer.decode(self._window))
        return self._give(held_back=False)

    def _use(self, decoded):
        self._pending += decoded[self._used :]
        self._used = max(self._used, len(decoded))

    def _unfinished(self, decoded):
        """How many characters at the end another token may change."""
        broken = len(decoded) - len(decoded.rstrip(BROKEN))
        if not self._tokenizer.clean_up:
            return broken
        last = decoded[-TIDIED:]
        tidied = [len(last) - at for mark in " '" if (at := last.find(mark)) >= 0]
        return max([broken, *tidied])

    def _let_go(self, decoded):
        """Forgets all but the last tokens, where the text of these alone is the end of the whole one's."""
        context = self._window[-CONTEXT:]
        text = self._tokenizer.decode(context)
        unused = len(decoded) - self._used
        is_clean = bool(text.strip()) and BROKEN not in (text[0], text[-1]) or len(self._window) > LONGEST_WINDOW
        if is_clean and decoded.endswith(text) and len(text) > unused >= 0:
            self._window, self._used = context, len(text) - unused

    def _give(self, held_back):
        if self.is_stopped:
            return ""
        if not self._given:
            self._pending = self._pending.lstrip()
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            piece, self._pending = self._pending[: min(found)].rstrip(), ""
        elif held_back:
            end = len(self._pending) - self._unsure(self._pending)
            piece, self._pending = self._pending[:end], self._pending[end:]
        else:
            piece, self._pending = self._pending.rstrip(), ""
        if piece:
            self._given.append(piece)
        return piece

    def _unsure(self, text):
        """How many characters at the end may be the beginning of a stop string, or end the answer as blanks."""
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return len(text) - min(len(text[: len(text) - n].rstrip()) for n in (0, *begun))
