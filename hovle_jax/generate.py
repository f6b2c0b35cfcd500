"""Answers questions about images.

    python -m hovle_jax.generate --checkpoint runs/instruct --image photo.png --prompt "what color is the shape?"
    python -m hovle_jax.generate --checkpoint smol-llm --prompt "What is the capital of France?"
    python -m hovle_jax.generate --checkpoint runs/instruct --input questions.jsonl --output answers.jsonl

Each `<image>` in a prompt takes one --image, in order; without any mark the images come first. A row of --input is
{"prompt": "...", "image": "a.png"} or has several under "images"; paths are relative to the file. A run that was
interrupted goes on by the same command.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.inference import options
from hovle_jax.system import command_line

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "The folder of a finished run or an import, as runs/instruct; smol-llm, which is fetched; or a public checkpoint: "
    "a folder in Hugging Face layout, a .gguf file or a hub id, imported on the way",
)  # fmt: skip
IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be given several times")
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "The question; may be given several times: answers in order, all about the same images"
)
INPUT = flags.DEFINE_string("input", "", "A .jsonl file of questions, in place of --prompt and --image")
BEAMS = flags.DEFINE_integer(
    "beams", None, "Beam search: so many beginnings are kept, and the likeliest answer is given; default: no search",
    lower_bound=1,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", "", "The .jsonl file that the answers to --input are written to")


def beams() -> int:
    """--beams; 0 = no search."""
    return BEAMS.value or 0


def check_beams() -> None:
    """Raises UserError for flags that a beam search would drop."""
    given = [name for name in options.OF_ENGINE if flags.FLAGS[name].present]
    given += ["dtype=int8"] if options.DTYPE.value == "int8" else []
    if BEAMS.value and given:
        raise UserError(f"--beams={BEAMS.value} looks for the likeliest answer: leave out --{' and --'.join(given)}")


def load_for_beams() -> Any:
    """The model of --checkpoint, without an engine."""
    from hovle_jax.conversion.downloads import model_folder
    from hovle_jax.inference.load import load_run

    loaded = load_run(model_folder(command_line.local_folder("checkpoint")), dtype=options.DTYPE.value)
    return loaded.with_max_tiles(options.MAX_TILES.value).answerer


def load() -> Any:
    """The model of --checkpoint."""
    return hovle_jax.load(
        command_line.local_folder("checkpoint"), max_tiles=options.MAX_TILES.value, dtype=options.DTYPE.value
    )


def on_prompts(prompts: list[str]) -> None:
    """Prints an answer a prompt. All that can be wrong with the input is known before a model is loaded."""
    from hovle_jax.data.images import load_image
    from hovle_jax.data.text.conversation import with_image_marks

    images = [load_image(path) for path in IMAGE.value]
    for prompt in prompts:
        with_image_marks([(prompt, None)], len(images))
    for said in beam_answers(prompts, images) if BEAMS.value else plain_answers(prompts, images):
        print(said)


def plain_answers(prompts: list[str], images: list) -> list[str]:
    """All at once."""
    return load().answer(prompts, images, options.SYSTEM.value, **options.request())


def beam_answers(prompts: list[str], images: list) -> Iterator[str]:
    """One after another."""
    from hovle_jax.inference.beam import Beam, answers
    from hovle_jax.inference.generate import Prompt

    asked = [Prompt(((text, None),), tuple(images), options.SYSTEM.value) for text in prompts]
    return answers(load_for_beams(), asked, Beam(beams()), options.MAX_NEW_TOKENS.value)


def on_file() -> None:
    """Writes a row of --output for each of --input that it lacks."""
    from hovle_jax.inference.many import read_questions, rows_done

    if PROMPT.value or IMAGE.value:
        raise UserError("--input has questions and images of its own: leave --prompt and --image out")
    if not OUTPUT.value:
        raise UserError("--output is missing: the .jsonl file for the answers to --input")
    questions, output = read_questions(pathlib.Path(INPUT.value)), pathlib.Path(OUTPUT.value)
    done = rows_done(output, questions)
    say = functools.partial(print, file=sys.stderr, flush=True)
    if done:
        say(f"{output} has {done:,} of {len(questions):,} answers: going on from there")
    if done < len(questions):
        with output.open("a", encoding="utf-8") as file:
            for row in rows(questions[done:], say):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    say(f"{len(questions):,} answers in {output}")


def rows(questions: list, say: Callable[[str], None]) -> Iterator[dict]:
    """Each question's row with its answer."""
    from hovle_jax.inference.beam import Beam
    from hovle_jax.inference.many import answer_rows, beam_rows

    if not BEAMS.value:
        return answer_rows(load(), questions, options.SYSTEM.value, options.request(), say)
    most = options.MAX_NEW_TOKENS.value
    return beam_rows(load_for_beams(), questions, options.SYSTEM.value, Beam(beams()), most, say)


def main() -> None:
    command_line.local_folder("checkpoint")
    check_beams()
    if INPUT.value:
        on_file()
    elif OUTPUT.value:
        raise UserError("--output is for the answers to --input; those to --prompt are printed")
    else:
        on_prompts(command_line.required("prompt"))


if __name__ == "__main__":
    command_line.run(main)
