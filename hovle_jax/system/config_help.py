"""What the keys of a config mean, and which key a mistyped one may have meant.

A meaning is written once, beside its field: under `Attributes:` in the docstring of the dataclass, or in a comment at
the end of the field's line.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator

# Width of the column of values; after a longer value, the meaning does not line up.
VALUE_WIDTH = 16
# The least likeness (see `_likeness`) of a key that is suggested, and how far below the best one it may be.
CUTOFF, SPREAD = 0.9, 0.25


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key of a config.

    Attributes:
      key: its dotted path, as 'config.data.tiles'.
      value: what it is set to; for a class without an instance, the default, or None without one.
      meaning: one line; empty if there is none.
    """

    key: str
    value: object
    meaning: str


def text_of(config: object) -> str:
    """All keys of a config (a dataclass) with their values and meanings, one per line, as --show prints them."""
    entries = list(entries_of(type(config), config))
    width = max(len(entry.key) for entry in entries)
    line = lambda e: f"{e.key:{width}}  {e.value!r:{VALUE_WIDTH}}  {e.meaning}".rstrip()
    return "\n".join(map(line, entries))


def entries_of(cls: type, config: object = None, prefix: str = "config") -> Iterator[Entry]:
    """The leaves of a dataclass and of the dataclasses in it.

    Args:
      cls: the dataclass.
      config: an instance of it, for values; an inner dataclass that is None is a single leaf. Without an instance, all
        inner dataclasses are walked.
    """
    hints, meanings = typing.get_type_hints(cls), meanings_of(cls)
    for field in dataclasses.fields(cls):
        key, inner = f"{prefix}.{field.name}", _dataclass_in(hints[field.name])
        default = None if field.default is dataclasses.MISSING else field.default
        value = default if config is None else getattr(config, field.name)
        if inner and (value is not None or config is None):
            yield from entries_of(inner, value, key)
        else:
            summary = _first_line(inner) if inner else ""
            yield Entry(key, value, meanings.get(field.name, summary))


def meanings_of(cls: type) -> dict[str, str]:
    """{field: one line about it}, from the class's docstring and the comments in its source."""
    meanings = _comments(cls) | _attributes(inspect.getdoc(cls) or "")
    return {name: text.removesuffix(".") for name, text in meanings.items()}


def nearest(key: str, cls: type, count: int = 3) -> list[str]:
    """Keys of the dataclass that may have been meant, the best match first.

    The last word decides: 'lr', 'learning_rate' and 'optimizer.learning_rat' all find config.optimizer.learning_rate.
    """
    word = key.split(".")[-1].lower()
    scores = {entry.key: _likeness(key, word, entry.key) for entry in entries_of(cls)}
    best = max(scores.values())
    near = [known for known, score in scores.items() if score > max(CUTOFF, best - SPREAD)]
    return sorted(near, key=lambda known: -scores[known])[:count]


def _likeness(key: str, word: str, known: str) -> float:
    """From 0 to 1.5: how alike the last words are and, at half the weight, the whole paths."""
    last = known.split(".")[-1]
    ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    initials = "".join(initial[0] for initial in last.split("_"))
    return (0.9 if len(word) > 1 and word == initials else ratio(word, last)) + 0.5 * ratio(f"config.{key}", known)


def _dataclass_in(hint: object) -> type | None:
    """The dataclass that a field holds, even if it may be None instead; else None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _attributes(docstring: str) -> dict[str, str]:
    """{name: text} of a docstring's section `Attributes:`; an entry may have several names and lines."""
    section = docstring.partition("Attributes:\n")[2].split("\n\n")[0]
    entries = re.split(r"^  (?=\S)", textwrap.indent(textwrap.dedent(section), "  "), flags=re.MULTILINE)
    found = {}
    for entry in filter(str.strip, entries):
        names, _, text = entry.partition(":")
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def _comments(cls: type) -> dict[str, str]:
    """{field: the comment at the end of its line}."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            rest = lines[last - 1].encode()[node.end_col_offset :].decode().strip()
            if rest.startswith("#"):
                found[node.target.id] = rest.lstrip("# ")
    return found
