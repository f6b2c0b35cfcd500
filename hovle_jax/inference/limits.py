"""How long a text a model reads: asked before anything is compiled."""

from hovle_jax.errors import UserError
from hovle_jax.model.config import LLMConfig

LONGEST = 4096  # tokens of a prompt with its answer, unless the model reads fewer


def longest(llm: LLMConfig, wanted: int | None) -> int:
    """The most tokens of a prompt with its answer: those wanted or `LONGEST`, no more than the model reads."""
    return min(wanted or LONGEST, llm.max_length)


def check_lengths(llm: LLMConfig, prompt: int, max_new_tokens: int, tiles: int = 0) -> None:
    """Raises UserError where a prompt of so many tokens and its answer go beyond the positions that the model knows.

    Dynamic NTK is made for longer texts: such a model has no limit of its own (model/rotary.py).

    Args:
      tiles: of the prompt's images, whose tokens are counted in `prompt`.
    """
    scaling = llm.stack.rope_scaling
    if prompt + max_new_tokens <= llm.max_length or (scaling is not None and scaling.kind == "dynamic"):
        return
    if prompt < llm.max_length:
        remedy = f"ask for at most {llm.max_length - prompt:,} new tokens (max_new_tokens), or for less in the prompt"
    else:
        remedy = "shorten the prompt, or give fewer images or tiles (max_tiles)"
    of_tiles = f", those of {tiles} tile{'s' * (tiles != 1)} included," if tiles else ""
    raise UserError(
        f"the prompt has {prompt:,} tokens{of_tiles} and its answer may have {max_new_tokens:,}: the model reads "
        f"{llm.max_length:,} in all; {remedy}"
    )
