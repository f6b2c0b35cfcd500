"""What came of asking: scores with their intervals, and a file of all answers."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

from hovle_jax.data.bad_samples import BadEvent, count_reasons
from hovle_jax.errors import UserError
from hovle_jax.evaluation.benchmark import Answered, Benchmark
from hovle_jax.evaluation.intervals import MeanScore
from hovle_jax.report.page import Sample, plain


@dataclasses.dataclass(frozen=True)
class Scored:
    """A benchmark that a model went through.

    Attributes:
      answered: every question with its answer.
      bad: rows that could not be asked.
    """

    benchmark: Benchmark
    answered: Sequence[Answered]
    bad: Sequence[BadEvent] = ()

    @property
    def means(self) -> dict[str, MeanScore]:
        """{name: mean score}, the main one first."""
        return self.benchmark.means(self.answered)

    @property
    def scores(self) -> dict[str, float]:
        """{name: number}: percents, and how many questions there were."""
        return self.benchmark.scores(self.answered)

    @property
    def mistakes(self) -> int:
        """How many answers are not quite right."""
        return sum(answered.score < 1 for answered in self.answered)

    @property
    def samples(self) -> list[Sample]:
        """All answers, as the report shows them."""
        return list(map(sample, self.answered))

    def details(self) -> dict:
        """What a command prints beside the scores."""
        if not self.answered:
            return {}
        main = self.means[self.benchmark.metric]
        found = {
            "95% interval": [round(end, 2) for end in main.interval],
            "baseline": round(main.baseline, 2),
            "commonest answer": main.commonest,
        }
        return found | ({"bad rows": count_reasons(self.bad)} if self.bad else {})


def sample(answered: Answered) -> Sample:
    """An answer beside its image; of several references it shows the one that was given."""
    item, references = answered.item, answered.item.references
    expected = next((one for one in references if plain(one) == plain(answered.answer)), references[0])
    return Sample(item.images[0] if item.images else None, item.question, answered.answer, expected)


def line(index: int, answered: Answered) -> dict:
    """A line of a predictions file."""
    item = answered.item
    found = {"index": index, "question": item.question, "answer": answered.answer, "references": item.references}
    found |= {name: value for name in ("options", "group") if (value := getattr(item, name))}
    return found | {"score": answered.score, "source": item.where[0], "row": item.where[1]}


@contextlib.contextmanager
def lines_into(path: str | pathlib.Path) -> Iterator[Callable[[dict], None]]:
    """A function that writes lines of JSON; the file takes its name when all are written.

    Raises:
      UserError: it cannot be written.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            yield lambda value: print(json.dumps(value, ensure_ascii=False), file=file)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another folder with --out") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_predictions(path: str | pathlib.Path, answered: Sequence[Answered]) -> None:
    """All answers, one a line."""
    with lines_into(path) as write:
        for index, one in enumerate(answered):
            write(line(index, one))
