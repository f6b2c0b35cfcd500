"""Draws where the LLM looks while it answers a question about images.

    python -m hovle_jax.attention --checkpoint runs/instruct --image photo.png --prompt "what color is the shape?" \\
        --output maps.png

The first, the middle and the last layer of the LLM unless --layer names others, counted from 1. The numbers of each
are printed; docs/answering.md says what they mean.
"""

import pathlib

from absl import flags

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.inference import options
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The folder of a finished run or an import, as runs/instruct")
IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be given several times")
PROMPT = flags.DEFINE_string("prompt", "", "The question; each <image> in it takes one --image, in order")
OUTPUT = flags.DEFINE_string("output", "maps.png", "The image to write: .png, .pdf or .svg")
LAYER = flags.DEFINE_multi_integer(
    "layer", [], "A layer of the LLM, from 1; may be given several times. Default: the first, the middle, the last"
)
ENDINGS = (".png", ".pdf", ".svg")


def main() -> None:
    """Answers, draws, and prints the answer and a line for each layer."""
    folder, question, paths = (
        command_line.local_folder("checkpoint"),
        *map(command_line.required, ("prompt", "image")),
    )
    output = pathlib.Path(OUTPUT.value)
    if output.suffix.lower() not in ENDINGS:
        raise UserError(f"--output={output}: its name must end with {', '.join(ENDINGS)}")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.absolute().parent}")
    from hovle_jax.data.images import load_image
    from hovle_jax.data.text.conversation import with_image_marks

    images = tuple(load_image(path) for path in paths)
    with_image_marks([(question, None)], len(images))
    model = hovle_jax.load(folder, max_tiles=options.MAX_TILES.value, slots=1, dtype=options.DTYPE.value, keep=True)
    from hovle_jax.inference.attention_figure import draw
    from hovle_jax.inference.attention_maps import attention_maps, check_layers
    from hovle_jax.inference.generate import Prompt

    answerer = model.loaded.answerer
    layers = check_layers(answerer.hovle, [layer - 1 for layer in LAYER.value] or None)
    (answer,) = model.answer([question], images, options.SYSTEM.value, **options.request())
    maps = attention_maps(answerer, Prompt(((question, None),), images, options.SYSTEM.value), answer, layers)
    draw(maps, output, f"{question} {answer}")
    print(printable(answer, lines=True))
    for layer, sparsity, share in zip(maps.layers, maps.sparsity, maps.image_share):
        print(
            f"layer {layer + 1} of {maps.num_layers}: sparsity {sparsity:.3f}, {share:.1%} of the attention on images"
        )
    print(f"drawn in {output}")


if __name__ == "__main__":
    command_line.run(main)
