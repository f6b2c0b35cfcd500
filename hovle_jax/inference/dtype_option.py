"""The flag --dtype of the commands that answer."""

from absl import flags

DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16", "int8"],
    "Of the weights; int8: about a third of float32. Default: bfloat16, and float32 on a CPU",
)  # fmt: skip
