"""Talks with a model in the terminal.

    python -m hovle_jax.chat --checkpoint runs/instruct

/image PATH shows it an image with what is said next, /new begins anew, /quit ends.
"""

import contextlib
import sys

from absl import flags

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.inference import options
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

flags.adopt_module_key_flags(options)  # so that --help lists them
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "The folder of a finished run or an import, as runs/instruct; smol-llm, which is fetched; or a public checkpoint: "
    "a folder in Hugging Face layout, a .gguf file or hf:ORG/NAME, imported on the way",
)  # fmt: skip
HELP = "/image PATH shows an image with what you say next, /new begins anew, /quit ends"


def main() -> None:
    """Reads lines until /quit or the end of the input. A mistake is answered by a line and costs nothing."""
    folder = command_line.local_folder("checkpoint")
    model = hovle_jax.load(folder, max_tiles=options.MAX_TILES.value, dtype=options.DTYPE.value)
    from hovle_jax.data.images import load_image

    begin = lambda: model.chat(options.SYSTEM.value, **options.request())
    chat, images = begin(), []
    print(HELP, file=sys.stderr)
    while (line := _next_line()) is not None and line != "/quit":
        try:
            if line == "/new":
                chat, images = begin(), []
            elif line.startswith("/image "):
                images.append(load_image(line.removeprefix("/image ").strip()))
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                _answer(chat, line, images)
                images = []
        except UserError as error:
            print(f"error: {printable(error)}", file=sys.stderr)


def _answer(chat, line, images):
    with contextlib.suppress(KeyboardInterrupt):  # which ends the answer; the chat goes on
        for piece in chat.stream(line, images):
            print(printable(piece, lines=True), end="", flush=True)
    print()


def _next_line():
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    command_line.run(main)
