"""How many times a `while` loop's body runs, from the text of the program.

The loop is counted by running it on the few integers that its condition reads: elements of the loop's tuple, whose
first values the caller sets. These may lie beneath copies, within a fusion, or in an element that the loop (or an outer
one) carries unchanged; `value` sees through that. What an outer loop changes is not known, so that a count which
depends on it is not told.
"""

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

from hovle_jax.aot.hlo.text import Computation, Instruction, Program

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "optimization-barrier", "copy-start", "copy-done")
_BINARY = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_DIRECTIONS = {name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")}
_MOST = 1 << 16  # iterations that are followed


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation and what is known of its parameters: argument(number, element or None) -> value or None."""

    program: Program
    computation: Computation
    argument: Callable[[int, int | None], Any] = lambda number, element: None

    def of(self, computation: str, argument: Callable) -> "Scope":
        """Another computation of the program."""
        return Scope(self.program, self.program.computations[computation], argument)

    def inside(self, called: str, x: Instruction) -> "Scope":
        """Of a computation that instruction x calls with its operands as parameters."""
        return self.of(called, lambda number, element: value(self, x.operands[number], element))

    def body(self, loop: Instruction) -> "Scope":
        """Of a loop's body: known are the elements that it carries unchanged from known values."""
        return self.of(loop.attribute("body"), lambda number, element: _carried(self, loop, element))


def value(scope: Scope, name: str, element: int | None = None) -> Any:
    """The integer or truth value that an instruction gives (or element `element` of its tuple); None: not known.

    Of a constant that is neither it is the text, and of a part of it the text of the whole.
    """
    x = scope.computation.instructions.get(name)
    if x is None:
        return None
    if x.opcode == "parameter":
        return scope.argument(int(x.arguments), element)
    if x.opcode in _TRANSPARENT:
        return value(scope, x.operands[0], element)
    if x.opcode == "dynamic-slice":
        whole = value(scope, x.operands[0])
        return whole if isinstance(whole, str) else None
    if x.opcode in ("fusion", "call") and len(x.called) == 1:
        inner = scope.inside(x.called[0], x)
        return value(inner, inner.computation.root, element)
    if x.opcode == "while":
        return _carried(scope, x, element)
    if x.opcode == "tuple" and element is not None:
        return value(scope, x.operands[element])
    if x.opcode == "get-tuple-element" and element is None:
        return value(scope, x.operands[0], int(x.attribute("index")))
    if x.opcode == "constant":
        return int(x.arguments) if re.fullmatch(r"-?\d+", x.arguments) else x.arguments
    apply = _DIRECTIONS[x.attribute("direction")] if x.opcode == "compare" else _BINARY.get(x.opcode)
    found = [value(scope, operand) for operand in x.operands] if apply else []
    return apply(*found) if apply and all(isinstance(each, int) for each in found) else None


def _carried(scope, loop, element, others=True):
    """The value of an element that is the same each time: which the loop's body hands on, or copies from such a one."""
    if element is None:
        return None
    first, mark = value(scope, loop.operands[0], element), object()
    after = lambda argument: value(body := scope.of(loop.attribute("body"), argument), body.computation.root, element)
    if after(lambda number, asked: mark if asked == element else None) is mark:
        return first
    known = lambda number, asked: None if asked in (None, element) else _carried(scope, loop, asked, others=False)
    return first if others and first is not None and after(known) == first else None


def trip_count(scope: Scope, loop: Instruction) -> int | None:
    """How often the body of a `while` instruction runs in this scope; None where it cannot be told."""
    if known := _KNOWN.search(loop.attributes):
        return int(known.group(1))
    state = {}  # elements that the condition reads, and their values

    def argument(number, element):
        if element not in state:
            state[element] = value(scope, loop.operands[0], element)
        return state[element]

    condition, body = (scope.of(loop.attribute(name), argument) for name in ("condition", "body"))
    goes_on = lambda: value(condition, condition.computation.root)
    count = 0
    while (more := goes_on()) and count < _MOST:
        # An element that the body alone reads is taken at its first value: so it must be one that never changes.
        read = tuple(state)
        after = {element: value(body, body.computation.root, element) for element in read}
        if any(_carried(scope, loop, element) is None for element in state if element not in read):
            return None
        state, count = {**state, **after}, count + 1
    return count if more is False else None
