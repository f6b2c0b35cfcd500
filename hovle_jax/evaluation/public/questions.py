"""From the rows of a TSV to what a model is asked, and to the cases that a rule set scores."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from hovle_jax.errors import UserError
from hovle_jax.evaluation import rules
from hovle_jax.evaluation.benchmark import Item
from hovle_jax.evaluation.public.table import JUDGED, LETTER, LETTER_OR_TEXT, YES_NO, Public
from hovle_jax.evaluation.public.tsv import Row, Table, texts
from hovle_jax.evaluation.rules.case import Case, Rule, Verdict
from hovle_jax.evaluation.rules.certainty import unit_key
from hovle_jax.evaluation.rules.options import LETTERS

# SEED's types by the names that its categories have in TSVs.
SEED_TYPES = {
    "scene understanding": 1, "instance identity": 2, "instance attribute": 3, "instance attributes": 3,
    "instance location": 4, "instance counting": 5, "instances counting": 5, "spatial relation": 6,
    "spatial relations": 6, "instance interaction": 7, "visual reasoning": 8, "text recognition": 9,
    "text understanding": 9, "action recognition": 10, "action prediction": 11, "procedure understanding": 12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """What of a TSV is asked.

    Attributes:
      benchmark, table: where it comes from.
      rows: the questions.
      split: what the score is of.
      rule_set: which scores the answers here; empty = they are submitted to `benchmark.server`.
      without_image: how many rows are left out, as VLMEvalKit does, as they have no image.
    """

    benchmark: Public
    table: Table
    rows: tuple[Row, ...]
    split: str
    rule_set: str
    without_image: int = 0

    def items(self, rows: Sequence[Row]) -> Iterator[Item]:
        """The questions of some of the rows; their images are read one question at a time."""
        for row in rows:
            hint, question = row.get("hint"), row.cells["question"]
            asked = f"{hint}\n{question}" if hint and self.benchmark.answer in (LETTER, LETTER_OR_TEXT) else question
            where = str(row.path), f"row {row.number}"
            yield Item(self.table.images(row), ((asked, None),), references(row), options(row), where=where)

    def cases(self, answer: Callable[[Row], str]) -> list[Case]:
        """The cases of all rows."""
        return [case for row in self.rows for case in cases(self.benchmark, row, answer(row))]


def choose(benchmark: Public, table: Table, rule_set: str = "", split: str = "", limit: int = 0) -> Asked:
    """What of a TSV is asked, checked as far as a file can be before a model is loaded.

    Args:
      rule_set: empty = the benchmark's own.
      split: of the TSV's; empty = the benchmark's own.
      limit: only the first so many questions, with all rows that they are scored together with; 0 = all.
    Raises:
      UserError: a column or a cell that the benchmark needs is missing or not what it should be, there is no such
        split, or nobody scores such a file.
    """
    table.require(benchmark.columns, benchmark.title)
    rows = _of_split(benchmark, table, split)
    seen = [row for row in rows if row.has_image]
    if not seen:
        raise UserError(f"{table.path} has no row with an image" + (f" in split {split!r}" if split else ""))
    rule_set, rule = _scorer(benchmark, seen, rule_set)
    for row in seen:
        _check(benchmark, row, bool(rule))
    kept = _first_units(benchmark, rule, seen, limit) if rule else seen[: limit or None]
    name = _split(benchmark, kept, split)
    asked = Asked(benchmark, table, tuple(kept), name, rule_set, without_image=len(rows) - len(seen))
    if rule:
        _check_report(rule, asked.cases(lambda row: ""))
    return asked


def _of_split(benchmark, table, split):
    found = list(dict.fromkeys(row.get("split") for row in table.rows))
    if split and split not in found:
        known = ", ".join(filter(None, found)) or "none"
        raise UserError(f"{table.path} has no rows of split {split!r}; its splits are: {known}")
    kept = [split] if split else [name for name in benchmark.only if name in found] or found
    return [row for row in table.rows if row.get("split") in kept]


def _split(benchmark, rows, split):
    """The split's name: the TSV's where it has one, else the benchmark's; without answers it is the test split."""
    found = {row.get("split") for row in rows}
    if split or (len(found) == 1 and "" not in found):
        return split or found.pop()
    blind = benchmark.answer != JUDGED and not any(row.get("answer") for row in rows)
    return "test" if blind else benchmark.split


def _scorer(benchmark, rows, rule_set) -> tuple[str, Rule | None]:
    """-> (the rule set, its rule); ('', None) where the answers are submitted."""
    if benchmark.answer == JUDGED:
        if rule_set:
            rules.find(benchmark.title, rule_set)  # says why not
        return "", None
    answers = any(row.get("answer") for row in rows)
    if rule_set and not answers:
        raise UserError(f"{rows[0].path} has no answers, so no rules can score it: leave --rules out")
    rule_set = rule_set or benchmark.rules
    rule = rules.find(benchmark.title, rule_set)
    if answers and rule.aggregate:
        return rule_set, rule
    if not benchmark.submission:
        raise UserError(
            f"{rows[0].path} has no answers, and no server takes {benchmark.title}: take a split with answers"
        )
    return "", None


def _check(benchmark, row, scored):
    """Raises UserError for a row that cannot be asked or scored."""
    if not row.get("question"):
        raise row.error("question", "it is empty")
    if benchmark.answer == LETTER and len(options(row)) < 2:
        raise row.error("B" if options(row) else "A", "it is empty, and the question needs two options or more")
    if not scored:
        return
    right = row.get("answer")
    if not right:
        raise row.error("answer", "it is empty; other rows have theirs: name a split with --split")
    if benchmark.answer == YES_NO and right.lower() not in ("yes", "no"):
        raise row.error("answer", f"{right!r} is neither yes nor no")
    letters = LETTERS[: len(options(row))]
    if letters and benchmark.answer in (LETTER, LETTER_OR_TEXT) and (len(right) != 1 or right not in letters):
        raise row.error("answer", f"{right!r} is the letter of none of its options, {letters[0]} to {letters[-1]}")


def _first_units(benchmark, rule, rows, limit):
    """The rows of the first units: all rotations of a question, both questions of an image."""
    keys = [unit_key(rule, cases(benchmark, row, "")[0], i) for i, row in enumerate(rows)]
    kept = set(list(dict.fromkeys(keys))[: limit or None])
    return [row for row, key in zip(rows, keys, strict=True) if key in kept]


def _check_report(rule, empty):
    """Lets a rule report on empty answers, so that what it cannot score is known before the model is asked."""
    for case in empty:
        rule.check(case)
    rule.number([(case, Verdict(None, 0.0)) for case in empty])


# ---------------------------------------------------------------------------------------------------------------------
# A row


def options(row: Row) -> tuple[str, ...]:
    """The texts of A, B, ...; raises UserError for a gap."""
    filled = [letter for letter in LETTERS if row.get(letter)]
    gap = next((letter for letter, wanted in zip(filled, LETTERS, strict=False) if letter != wanted), None)
    if gap:
        missing = LETTERS[filled.index(gap)]
        raise row.error(missing, f"it is empty, and there is an option {gap}")
    return tuple(row.get(letter) for letter in filled)


def references(row: Row) -> tuple[str, ...]:
    """The right answers, of which a cell may hold a list."""
    return texts(row.get("answer"))


def cases(benchmark: Public, row: Row, prediction: str) -> list[Case]:
    """What rule sets read of a row: one case, but of a row of several of POPE's categories one of each."""
    case = Case(
        prediction=prediction,
        answers=references(row),
        options=options(row),
        index=int(row.index) if row.index.isdecimal() else row.index,
        category=row.get("category"),
        l2_category=row.get("l2-category") or row.get("l2_category"),
        split=row.get("split"),
        image=row.get("image_path"),
        dataset=row.get("dataset"),
        question_type_id=_seed_type(benchmark, row),
    )
    if benchmark.title != "POPE":
        return [case]
    return [dataclasses.replace(case, category=name.strip()) for name in case.category.split(",")]


def _seed_type(benchmark, row):
    given = row.get("question_type_id")
    if given and not given.isdecimal():
        raise row.error("question_type_id", f"{given!r} is no number")
    return int(given) if given else SEED_TYPES.get(row.get("category").lower(), 0) if benchmark.title == "SEED" else 0
