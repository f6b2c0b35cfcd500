"""Answers a question about an image.

    python -m hovle_jax.generate --checkpoint runs/instruct --image photo.png --prompt "what color is the shape?"
    python -m hovle_jax.generate --checkpoint smol-llm --prompt "What is the capital of France?"

Each `<image>` in the prompt takes one --image, in order; without any mark the images come first.
"""

from absl import flags

from hovle_jax.system import command_line

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The folder of a finished run or an import, as runs/instruct; or smol-llm, which is fetched"
)
IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be given several times")
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "The question; may be given several times: answers in order, all about the same images"
)
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; several images share them. Default: as in training", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "The longest answer", lower_bound=1)


def main() -> None:
    folder, prompts = command_line.local_folder("checkpoint"), command_line.required("prompt")
    from hovle_jax.data.images import load_image
    from hovle_jax.data.text.conversation import with_image_marks

    # All that can be wrong with the input is known before a model is loaded.
    images = [load_image(path) for path in IMAGE.value]
    for prompt in prompts:
        with_image_marks([(prompt, None)], len(images))

    from hovle_jax.conversion.downloads import resolve
    from hovle_jax.inference.folders import check_model_folder

    folder = resolve(folder)
    check_model_folder(folder)

    from hovle_jax.inference.generate import Prompt, answer
    from hovle_jax.inference.load import load_run

    loaded = load_run(folder).with_max_tiles(MAX_TILES.value)
    for said in answer(loaded.answerer, [Prompt.of(prompt, *images) for prompt in prompts], MAX_NEW_TOKENS.value):
        print(said)


if __name__ == "__main__":
    command_line.run(main)
