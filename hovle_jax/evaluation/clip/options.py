"""Flags of the commands that classify; a module that defines flags imports nothing that takes time."""

from absl import flags

TEMPLATES = flags.DEFINE_string(
    "templates", "", "Prompts of the classes: simple (the default), plain, seven, photos, drawings, pets, ... or a "
    "file with one a line, {} for the class. Several are averaged",
)  # fmt: skip
PROMPT = flags.DEFINE_string(
    "prompt", "", "What HoVLE is asked of an image, whose answer is a class. Default: what is in the picture?"
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images, or with HoVLE pairs of image and class, at once", 1)
