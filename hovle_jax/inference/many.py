"""Many questions from a file: answered in order, as many at a time as there are slots, and resumable."""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files import image_paths
from hovle_jax.errors import UserError
from hovle_jax.inference.answering import AnsweringModel, opened, request_of
from hovle_jax.inference.beam import Beam, answers
from hovle_jax.inference.engine import Stream
from hovle_jax.inference.generate import Answerer, Prompt
from hovle_jax.system.json_lines import whole_lines

T = TypeVar("T")
A = TypeVar("A")
PROMPTS = ("prompt", "question")  # the key that a question may have


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of the file: `row` as it is, what is asked, and the paths of its images."""

    row: dict
    prompt: str
    images: tuple[pathlib.Path, ...]


def read_questions(path: pathlib.Path, outside_root: bool = False) -> list[Question]:
    """The rows of a .jsonl file.

    Args:
      outside_root: images may lie elsewhere than below the file's folder.
    Raises:
      UserError: a line, whose number it says, asks nothing or names an image that may not be read.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    lines = path.read_text("utf-8").splitlines()
    return [
        _question(line, f"{path}:{number}", path.parent, outside_root)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _question(line, where, folder, outside_root):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error})") from None
    asked = [row[key] for key in PROMPTS if isinstance(row, dict) and isinstance(row.get(key), str)]
    if not asked:
        raise UserError(f'{where}: no text under "{PROMPTS[0]}" or "{PROMPTS[1]}"')
    images = row.get("images", row.get("image", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f'{where}: "image" is a path, "images" a list of paths')
    return Question(row, asked[0], tuple(_image(image, where, folder, outside_root) for image in images))


def _image(image, where, folder, outside_root):
    try:
        path = pathlib.Path(image_paths.local_file(image, str(folder), outside_root))
    except BadSample as error:
        raise UserError(f"{where}: {error.detail}") from None
    if not path.is_file():
        raise UserError(f"{where}: there is no image {folder / image}")
    return path


def rows_done(output: pathlib.Path, questions: Sequence[Question]) -> int:
    """How many of the first questions a file has answers to; an unfinished line at its end is cut off.

    Raises:
      UserError: its rows are not those of the questions.
    """
    done = [json.loads(line) for line in whole_lines(output) if line.strip()]
    for number, (row, question) in enumerate(zip(done, questions), 1):
        if {**row, "answer": None} != {**question.row, "answer": None}:
            raise UserError(f"{output}:{number} answers another question than --input: give another --output")
    if len(done) > len(questions):
        raise UserError(f"{output} has {len(done):,} answers to {len(questions):,} questions: give another --output")
    return len(done)


def answer_rows(model: AnsweringModel, questions: Sequence[Question], system: str, options: dict) -> Iterator[dict]:
    """Each question's row with its "answer", in order. `options`: see `answering.request_of`."""
    request = request_of(**options)

    def submit(question):
        return model.engine.submit(Prompt(((question.prompt, None),), opened(question.images), system), request)

    return (q.row | {"answer": text} for q, text in in_order(model.engine, questions, submit))


def beam_rows(
    answerer: Answerer, questions: Sequence[Question], system: str, beam: Beam, max_new_tokens: int
) -> Iterator[dict]:
    """The same by beam search."""
    prompts = (Prompt(((q.prompt, None),), opened(q.images), system) for q in questions)
    texts = answers(answerer, prompts, beam, max_new_tokens)
    return (q.row | {"answer": text} for q, text in zip(questions, texts))


class Steps(Protocol):
    """What `in_order` needs of an engine."""

    num_slots: int

    def step(self, prompts_first: bool = False) -> bool: ...


def in_order(engine: Steps, items: Iterable[T], submit: Callable[[T], Stream | A]) -> Iterator[tuple[T, str | A]]:
    """(item, its answer), in order.

    Args:
      submit: queues an item in the engine; what else it gives takes the answer's place, of an item that is not asked.
    """
    rest, waiting = iter(items), collections.deque()
    while True:
        # Twice as many as there are slots, so that a free one is given away at once.
        waiting += [(item, submit(item)) for item in itertools.islice(rest, 2 * engine.num_slots - len(waiting))]
        if not waiting:
            return
        item, asked = waiting.popleft()
        while isinstance(asked, Stream) and not asked.finish:
            engine.step(prompts_first=True)
        yield item, asked.text if isinstance(asked, Stream) else asked
