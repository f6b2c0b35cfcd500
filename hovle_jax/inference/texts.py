"""The text of an answer while it is made: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from hovle_jax.data.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for a character whose bytes are not all there


class TextSoFar:
    """Tokens in, pieces of text out.

    Attributes:
      text: all that was given out.
      is_stopped: whether a stop string was met; it and what follows are not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops, self._ids = tokenizer, tuple(stop for stop in stops if stop), []
        self.text, self.is_stopped = "", False

    def add(self, token: int) -> str:
        """What can be said after one more token: without what may yet become another character or a stop string."""
        self._ids.append(token)
        return self._give(held_back=True)

    def end(self) -> str:
        """What was held back."""
        return self._give(held_back=False)

    def _give(self, held_back):
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(self._ids)
        whole = whole.lstrip() if held_back else whole.strip()
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.is_stopped, whole = True, whole[: min(found)]
        elif held_back:
            whole = whole[: len(whole) - self._unsure(whole)]
        piece = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += piece
        return piece

    def _unsure(self, text):
        """How many characters at the end may still change, or be the beginning of a stop string."""
        broken = len(text) - len(text.rstrip(BROKEN))
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        blank = len(text) - len(text.rstrip())  # an answer ends without blanks
        return max([broken, blank, *begun])
