"""Flags of the commands that answer; a module that defines flags imports nothing that takes time."""

from typing import Any

from absl import flags

from hovle_jax.inference.dtype_option import DTYPE

MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "The longest answer, in tokens", lower_bound=1)
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; several images share them. Default: as in training", lower_bound=1
)
flags.declare_key_flag(DTYPE.name)  # so that --help lists it
SYSTEM = flags.DEFINE_string("system", "", "The system message; empty: the model's own")
STOP = flags.DEFINE_multi_string("stop", [], "A text that ends the answer; may be given several times")
SAMPLING = (
    flags.DEFINE_float("temperature", 0.0, "What logits are divided by; 0 takes the most likely token"),
    flags.DEFINE_integer("top_k", 0, "Only the k most likely tokens; 0: all"),
    flags.DEFINE_float("top_p", 1.0, "Only the fewest tokens whose probabilities sum to p"),
    flags.DEFINE_float("min_p", 0.0, "Only tokens at least this share as likely as the most likely one"),
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens that were read or made before are less likely"),
    flags.DEFINE_integer("seed", 0, "Of the draws; the same seed gives the same answer"),
)
OF_ENGINE = (STOP.name, *(holder.name for holder in SAMPLING))  # what a beam search has not


def request() -> dict[str, Any]:
    """The flags as keywords of `answering.request_of`."""
    sampling = {holder.name: holder.value for holder in SAMPLING}
    return {"max_new_tokens": MAX_NEW_TOKENS.value, "stop": tuple(STOP.value), **sampling}
