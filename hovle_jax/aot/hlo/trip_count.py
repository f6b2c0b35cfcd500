"""How many times a `while` loop's body runs, from the text of the program.

A counted loop keeps an induction variable as element i of its tuple: the condition compares it with a bound, the body
adds a constant to it, and the caller sets its first value. Each of these may stand behind copies, within a fusion or
in an element that the loop (or an outer one) carries unchanged; `linear` sees through that.
"""

import dataclasses
import re
from collections.abc import Callable

from hovle_jax.aot.hlo.text import Computation, Instruction, Program

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "optimization-barrier", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Linear:
    """offset + the tuple's element `variable` (None: a constant)."""

    offset: int
    variable: int | None = None


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation and what is known of its parameters: argument(number, element or None) -> Linear or None."""

    program: Program
    computation: Computation
    argument: Callable

    def instruction(self, name):
        return self.computation.instructions[name]

    def inside(self, called, instruction):
        """The scope of a computation that `instruction` calls with its operands as parameters."""

        def argument(number, element):
            return linear(self, instruction.operands[number], element)

        return Scope(self.program, self.program.computations[called], argument)


def linear(scope, name, element=None):
    """The integer that an instruction gives (or element `element` of its tuple), as far as it can be told.

    Returns:
      Linear, or None.
    """
    x = scope.instruction(name)
    if x.opcode == "parameter":
        return scope.argument(int(x.arguments), element)
    if x.opcode in _TRANSPARENT:
        return linear(scope, x.operands[0], element)
    if x.opcode == "get-tuple-element" and element is None:
        return linear(scope, x.operands[0], int(x.attribute("index")))
    if x.opcode == "tuple" and element is not None:
        return linear(scope, x.operands[element])
    if x.opcode in ("fusion", "call") and len(x.called) == 1:
        inner = scope.inside(x.called[0], x)
        return inner.computation.root and linear(inner, inner.computation.root.name, element)
    if x.opcode == "while" and element is not None and _carried(scope, x, element):
        return linear(scope, x.operands[0], element)
    if element is not None:
        return None
    if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.arguments):
        return Linear(int(x.arguments))
    if x.opcode in ("add", "subtract"):
        return _sum(*(linear(scope, operand) for operand in x.operands), 1 if x.opcode == "add" else -1)
    return None


def _sum(a, b, sign):
    if a is None or b is None or (a.variable is not None and b.variable is not None):
        return None
    if sign < 0 and b.variable is not None:
        return None
    return Linear(a.offset + sign * b.offset, b.variable if a.variable is None else a.variable)


def _symbolic(program, name):
    """A loop's body or condition with its tuple's elements as unknowns."""
    return Scope(program, program.computations[name], lambda number, element: Linear(0, element))


def _carried(scope, loop, element):
    """Whether the body hands an element on as it is."""
    body = _symbolic(scope.program, loop.attribute("body"))
    return linear(body, body.computation.root.name, element) == Linear(0, element)


def body_scope(scope, loop):
    """The scope of a loop's body: known are the elements that it carries unchanged from known values."""

    def argument(number, element):
        if element is None or not _carried(scope, loop, element):
            return None
        return linear(scope, loop.operands[0], element)

    return Scope(scope.program, scope.program.computations[loop.attribute("body")], argument)


def _comparison(scope):
    """The condition's (left, right, direction), through fusions, or None."""
    x: Instruction | None = scope.computation.root
    while x is not None and x.opcode in _TRANSPARENT:
        x = scope.instruction(x.operands[0])
    if x is None:
        return None
    if x.opcode in ("fusion", "call") and len(x.called) == 1:
        return _comparison(scope.inside(x.called[0], x))
    if x.opcode != "compare":
        return None
    left, right = (linear(scope, operand) for operand in x.operands)
    return left, right, x.attribute("direction")


def trip_count(scope, loop):
    """How often the body of a `while` instruction runs in this scope, or None where it cannot be told."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known.group(1))
    found = _comparison(_symbolic(scope.program, loop.attribute("condition")))
    if not found or None in found[:2]:
        return None
    left, right, direction = found
    body = _symbolic(scope.program, loop.attribute("body"))
    steps = [_step(body, side) for side in (left, right)]
    if not steps[0]:
        left, right, direction, steps = right, left, _MIRRORED.get(direction), steps[::-1]
    first, last = _value(scope, loop, left), _value(scope, loop, right)
    if not steps[0] or steps[1] != 0 or first is None or last is None:
        return None
    return _count(first, last, steps[0], direction)


def _step(body, side):
    """What an iteration adds to a side of the comparison, or None where it cannot be told."""
    if side.variable is None:
        return 0
    after = linear(body, body.computation.root.name, side.variable)
    return after.offset if after is not None and after.variable == side.variable else None


def _value(scope, loop, side):
    """What a side of the comparison is before the first iteration."""
    if side.variable is None:
        return side.offset
    start = linear(scope, loop.operands[0], side.variable)
    return None if start is None or start.variable is not None else start.offset + side.offset


def _count(first, last, step, direction):
    """Iterations of `for (i = first; i DIRECTION last; i += step)`."""
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(last + (direction == "LE") - first) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(first - last + (direction == "GE")) // -step))
    if direction == "NE" and (last - first) % step == 0:
        return (last - first) // step
    return None
