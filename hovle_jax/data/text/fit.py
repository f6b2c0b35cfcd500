"""Whether a model knows all ids of a tokenizer; ids beyond its vocabulary would be clipped silently."""

from hovle_jax.data.text.tokenizer import ADDED_TOKENS, Tokenizer
from hovle_jax.errors import UserError


def check_fit(tokenizer: Tokenizer, known: int, where: object, sees_images: bool = True) -> None:
    """Checks all ids of a tokenizer.

    Args:
      known: how many ids the model reads.
      where: how the message names the tokenizer.
      sees_images: if not, the ids of chat and image tokens may be too large: an LLM taken out of a larger model never
        reads them.
    Raises:
      UserError: ids are negative, or the model does not know them.
    """
    specials = tokenizer.specials
    negative = sorted(token for token, i in specials.items() if i < 0)
    if negative:
        raise UserError(f"{where}: {negative[0]!r} has the id {specials[negative[0]]}; ids begin at 0")
    unused = set() if sees_images else {specials[t] for t in ADDED_TOKENS if specials.get(t, -1) >= known}
    if tokenizer.vocab_size - len(unused) > known:
        raise UserError(
            f"{where} has ids up to {tokenizer.vocab_size - 1:,} and the model knows {known:,} ids: it is another "
            "model's tokenizer"
        )
