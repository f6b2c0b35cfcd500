"""HoVLE, the monolithic vision-language model with a holistic embedding, in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:  # JAX is imported when it is needed
    from hovle_jax.inference.answering import AnsweringModel

__version__ = "0.1.0"


def load(
    name: str | os.PathLike,
    *,
    max_tiles: int | None = None,
    slots: int | None = None,
    length: int | None = None,
    dtype: str = "",
    keep: bool = False,
    cache: str = "",
) -> "AnsweringModel":
    """A model that answers.

        model = hovle_jax.load("runs/instruct")
        model.answer("what color is the shape?", images=["photo.png"])

    Args:
      name: the folder of a finished run or an import; or smol-llm, which is downloaded once; or a public checkpoint (a
        folder in Hugging Face layout, a .gguf file, hf:ORG/NAME), which is imported once into the cache folder.
      max_tiles: the most tiles of an image; None = as in training.
      slots: prompts that are answered at once; None = 8, or as many as there is memory for.
      length: the most tokens of a prompt with its answer; None = what the model reads, up to 4,096.
      dtype: 'float32', 'bfloat16', or 'int8': weights in int8, all else as without it. Empty = bfloat16, and float32 on
        a CPU.
      keep: keep the weights as they were trained, too, which attention maps need.
      cache: of what was read: 'bfloat16', or 'int8' in half of its memory; empty = as it was computed, and bfloat16
        beside weights in int8.
    Raises:
      UserError: no such folder, or it holds no finished model that answers, or there is not enough memory.
    """
    from hovle_jax.conversion.downloads import model_folder
    from hovle_jax.inference.answering import AnsweringModel

    return AnsweringModel.of_folder(model_folder(name), max_tiles, slots, length, dtype, keep, cache)
