"""What an instruction of a scheduled program for TPUs is: its kind, its part of the model, libtpu's estimate."""

import math
import re

from hovle_jax.aot.hlo.text import Computation, Instruction, arrays
from hovle_jax.aot.hlo.trip_count import Scope

MATMUL, ELEMENTWISE, LAYOUT, KERNELS, NETWORK = "matmul", "elementwise", "layout", "kernels", "network"  # kinds
LOSS, REST = "loss", "rest"  # parts: what is differentiated outside of a module; what is not differentiated

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 2**63 - 1  # what libtpu writes of work that it gives to a SparseCore
_ARRAY = re.compile(r"\w+\[[^\]]*\](?:\{[^{}]*\})?")
_NOTHING = set("bitcast constant get-tuple-element parameter tuple".split())
_MOVES = _NOTHING | set("broadcast concatenate copy fusion gather pad reshape reverse scatter slice transpose".split())
_MOVES |= {"dynamic-slice", "dynamic-update-slice"}
# Nothing is done for these, or beside other work: copies between memories that the schedule has started early.
FREE = _NOTHING | set("after-all opt-barrier optimization-barrier partition-id replica-id".split())
FREE |= set("copy-start copy-done slice-start slice-done dynamic-slice-start dynamic-slice-done".split())
FREE |= {"dynamic-update-slice-start", "dynamic-update-slice-done"}
# Calls that are notes to the compiler.
FREE_CALLS = set(
    "AllocateBuffer AssumeGatherIndicesInBound ConcatBitcast GatherScatterIndicesBitpacked ZeroCrop".split()
)


def cycles(x: Instruction) -> int | None:
    """libtpu's estimate of the cycles of a core; None without one."""
    found = _CYCLES.search(x.attributes)
    return int(found.group(1)) if found and int(found.group(1)) != _UNKNOWN else None


def kind_of(scope: Scope, x: Instruction) -> tuple[str, float]:
    """Its kind, by the operations in what the instruction calls; and the FLOPs of matmuls among them."""
    runs = list(_all(scope.program, scope.computation, x))
    if flops := sum(_flops(within, y) for within, y in runs if y.opcode in ("convolution", "dot")):
        return MATMUL, flops
    return (LAYOUT if {y.opcode for _, y in runs} <= _MOVES else ELEMENTWISE), 0.0


def _all(program, within, x):
    """(computation, instruction) of an instruction and of all that it calls."""
    yield within, x
    for called in (program.computations[name] for name in x.called):
        for y in called.instructions.values():
            yield from _all(program, called, y)


def _flops(within, x):
    """[m, k] x [k, n] has 2 mkn, the root of the sizes' product; of a batch of b this is sqrt(b) times more.

    int8 counts half: v5e, v5p and v6e multiply twice as much of it.
    """
    shapes = [x.shape, *(within.instructions[name].shape for name in x.operands[:2])]
    pairs = 1 if shapes[1].startswith("s8[") else 2
    sizes = [math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2].partition("]")[0]))) for shape in shapes]
    return pairs * math.prod(sizes) ** 0.5


def part_of(x: Instruction) -> str:
    """The Flax module at the top of the operation's path; LOSS, REST, or '' where the path is not kept."""
    path = x.attribute("op_name")
    if found := re.search(r"jvp\(([^()]*)\)", path):
        return found.group(1).split(".")[0] or LOSS
    modules = [name.split(".")[0] for name in path.split("/") if name[:1].isupper()]
    return [*modules, REST][0] if "/" in path else ""


def memory_bytes(computation: Computation, x: Instruction) -> int:
    """Bytes that an instruction moves to and from a device's large memory (HBM).

    What has a memory space, S(1) for that of the vector units, lies elsewhere. A slice reads no more than it gives, and
    an update in place writes no more than it takes.
    """
    results = _in_memory(x.shape)
    operands = [_in_memory(computation.instructions[name].shape) for name in x.operands]
    if x.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * results
    if x.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[-1 if x.opcode == "scatter" else 1]
    return results + sum(operands)


def _in_memory(shape):
    return sum(size for text in _ARRAY.findall(shape) if "S(" not in text for _, size in arrays(text))
