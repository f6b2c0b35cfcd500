"""Answers questions about images.

    python -m hovle_jax.generate --checkpoint runs/instruct --image photo.png --prompt "what color is the shape?"
    python -m hovle_jax.generate --checkpoint smol-llm --prompt "What is the capital of France?"
    python -m hovle_jax.generate --checkpoint runs/instruct --input questions.jsonl --output answers.jsonl

Each `<image>` in a prompt takes one --image, in order; without any mark the images come first. A row of --input is
{"prompt": "...", "image": "a.png"} or has several under "images"; paths are relative to the file. A run that was
interrupted goes on by the same command.

Several hosts share the rows of --input where the same command is started on each (--coordinator, --hosts, --host, or as
jax finds them on a TPU pod): host 0 writes --output, which no other host needs to see; --input, its images and
--checkpoint must be on every host, on a shared file system or as copies. Another number of hosts can go on.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.hosts import options as hosts
from hovle_jax.inference import options
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

if TYPE_CHECKING:
    from hovle_jax.inference.many import Question

flags.adopt_module_key_flags(options)  # so that --help lists them
flags.adopt_module_key_flags(hosts)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "The folder of a finished run or an import, as runs/instruct; smol-llm, which is fetched; or a public checkpoint: "
    "a folder in Hugging Face layout, a .gguf file or hf:ORG/NAME, imported on the way",
)  # fmt: skip
IMAGE = flags.DEFINE_multi_string("image", [], "An image; may be given several times")
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "The question; may be given several times: answers in order, all about the same images"
)
INPUT = flags.DEFINE_string("input", "", "A .jsonl file of questions, in place of --prompt and --image")
OUTSIDE_ROOT = flags.DEFINE_bool("outside_root", False, "Images of --input may lie elsewhere than below its folder")
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
        print(printable(said, lines=True))


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
    """Writes a row of --output for each of --input that it lacks; several hosts share them."""
    from hovle_jax.hosts import distributed
    from hovle_jax.inference.many import read_questions

    if PROMPT.value or IMAGE.value:
        raise UserError("--input has questions and images of its own: leave --prompt and --image out")
    if not OUTPUT.value:
        raise UserError("--output is missing: the .jsonl file for the answers to --input")
    questions = read_questions(pathlib.Path(INPUT.value), OUTSIDE_ROOT.value)
    given = {"system": options.SYSTEM.value, "max_tiles": options.MAX_TILES.value, "dtype": options.DTYPE.value}
    given |= {"beams": BEAMS.value}
    rows = hashlib.sha256(json.dumps([question.row for question in questions]).encode()).hexdigest()[:16]
    hosts.start({"--input": rows, "options": options.request() | given})
    with distributed.ending_together():
        answer_file(questions, pathlib.Path(OUTPUT.value))


def answer_file(questions: "list[Question]", output: pathlib.Path) -> None:
    """The same on each host; host 0 alone reads and writes the file, and speaks."""
    from hovle_jax.hosts import distributed
    from hovle_jax.hosts.sharing import made_together
    from hovle_jax.inference.many import rows_done
    from hovle_jax.system.json_lines import adding_to
    from hovle_jax.system.progress import track

    leads = distributed.is_leader()
    say = functools.partial(print, file=sys.stderr, flush=True) if leads else lambda line: None
    done = distributed.gather("rows that are done", rows_done(output, questions) if leads else 0)[0]
    if done:
        say(f"{output} has {done:,} of {len(questions):,} answers: going on from there")
    rest = questions[done:]
    if rest:
        rows = made_together(rest, answers_to_rows())
        with adding_to(output, "give another --output") if leads else contextlib.nullcontext(print) as add:
            for row in track(rows, say, "answers", "questions", len(rest)):
                add(row)
    say(f"{len(questions):,} answers in {output}")


def answers_to_rows() -> "Callable[[Sequence[Question]], Iterator[dict]]":
    """Loads the model -> what gives each question's row with its answer."""
    from hovle_jax.inference.beam import Beam
    from hovle_jax.inference.many import answer_rows, beam_rows

    system = options.SYSTEM.value
    if not BEAMS.value:
        model = load()
        return lambda questions: answer_rows(model, questions, system, options.request())
    answerer, beam, most = load_for_beams(), Beam(beams()), options.MAX_NEW_TOKENS.value
    return lambda questions: beam_rows(answerer, questions, system, beam, most)


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
