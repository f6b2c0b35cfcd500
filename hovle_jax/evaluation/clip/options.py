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
CORRUPTIONS = flags.DEFINE_string(
    "corruptions",
    "",
    "Of shift: all, or kinds (noise, blur, weather, digital) and names with commas; each at 5 strengths",
)
BASELINE = flags.DEFINE_string(
    "baseline", "", "Of shift: a CSV of other models' accuracies in percent, clean,mean: gives effective robustness"
)
CORRUPTION_SEED = flags.DEFINE_integer(
    "corruption_seed", 0, "Of shift: of what is drawn for corruptions", lower_bound=0
)
OF_CLASSES, OF_SHIFT = (TEMPLATES, PROMPT, BATCH_SIZE), (CORRUPTIONS, BASELINE, CORRUPTION_SEED)
