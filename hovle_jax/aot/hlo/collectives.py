"""The collectives of a compiled program: what, how many bytes, among how many devices, how many times a step.

What the text does not show at a glance, as seen in programs for TPUs:
- a loop's collectives run as often as its body (`trip_count`), nested loops multiply;
- an all-gather that overlaps with matmuls is written several times, in a fusion that starts it, in those that it
  runs beside and in one that ends it, all under one channel and chain: it is one;
- a windowed matmul turns an all-gather or a reduce-scatter into a loop of collective-permutes: they are reported as
  such, and their bytes add up to the same;
- a reduce-scatter along one axis of the torus is an all-reduce in a computation `all-reduce-scatter` that keeps a part;
- what runs on a SparseCore stands in a computation of its own, which a `call-start` names;
- between slices there are no collectives but `send`s to the runtime, marked with what they are a part of.
All branches of a conditional are counted, which is an upper bound.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from hovle_jax.aot.hlo.replica_groups import replica_groups
from hovle_jax.aot.hlo.text import Computation, Instruction, Program, arrays, parse
from hovle_jax.aot.hlo.trip_count import Scope, trip_count

_of_all_but_own = lambda n: (n - 1) / n

# {kind: bytes that each of n devices sends for a byte that it puts in, by a ring algorithm (Patarasuk and Yuan 2009)}
KINDS = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": _of_all_but_own,
    "all-reduce": lambda n: 2 * _of_all_but_own(n),  # a scatter, then a gather
    "all-to-all": _of_all_but_own,
    "ragged-all-to-all": _of_all_but_own,
    "collective-permute": lambda n: n > 1,
    "collective-broadcast": lambda n: n > 1,
}
PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as each device runs it."""

    kind: str  # of KINDS
    dtype: str  # of its first operand
    operand_bytes: int  # what a device puts in
    group: tuple[int, ...]  # devices of the mesh that take part together, one such set; of a send, slices
    crosses_slices: bool  # a group has devices of several slices: its traffic goes over the data-centre network
    times: int | None  # that it runs in one execution of the program; None: in a loop whose trip count cannot be told
    # Whether other work can go on meanwhile: it starts and ends in two instructions, is a part of fusions that
    # multiply, or runs on another core.
    beside: bool
    name: str  # of the instruction

    @property
    def group_size(self) -> int:
        return len(self.group)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends (and receives) when it runs once."""
        return KINDS[self.kind](self.group_size) * self.operand_bytes

    @property
    def bytes(self) -> float:
        """Bytes that each device sends in one execution of the program; of an unknown trip count, one iteration's."""
        return self.wire_bytes * (1 if self.times is None else self.times)


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a kind."""

    count: int  # executions
    bytes: float  # that each device sends, those between slices included
    beside: float  # of these, while other work can go on
    dcn_bytes: float  # of these, by collectives that cross slices
    unknown: int  # how many have an unknown trip count, and were counted once

    @classmethod
    def of(cls, found: list[Collective]) -> "Total":
        return cls(
            count=sum(1 if c.times is None else c.times for c in found),
            bytes=sum(c.bytes for c in found),
            beside=sum(c.bytes for c in found if c.beside),
            dcn_bytes=sum(c.bytes for c in found if c.crosses_slices),
            unknown=sum(c.times is None for c in found),
        )


def collectives(text: str, devices_per_slice: int | None = None) -> list[Collective]:
    """The collectives of `compiled.as_text()` in the order in which they first stand there.

    Args:
      devices_per_slice: where the program is for several slices, whose devices lie one slice after the other in the
        mesh (the slices are its outermost axis).
    """
    program = parse(text)
    runs = _executions(program)
    return [made for run in runs if (made := _collective(program, run, devices_per_slice))]


def inside(scope: Scope, x: Instruction, devices_per_slice: int | None = None) -> list[Collective]:
    """The collectives of what an instruction calls, or the one that it is."""
    runs = [_Execution(x, scope.computation, 1, False)]
    if x.called and x.opcode in ("fusion", "call-start", "async-start"):
        runs = [run for called in x.called for run in _run(scope.inside(called, x), 1, False)]
    return [made for run in runs if (made := _collective(scope.program, run, devices_per_slice))]


def summary(found: list[Collective]) -> dict[str, Total]:
    """By kind."""
    kinds = dict.fromkeys(c.kind for c in found)
    return {kind: Total.of([c for c in found if c.kind == kind]) for kind in kinds}


def kernels(text: str) -> list[str]:
    """The JAX operation of each call of a Pallas kernel in a program for TPUs."""
    instructions = (run.instruction for run in _executions(parse(text)))
    return [x.attribute("op_name") for x in instructions if x.attribute("custom_call_target") == PALLAS]


class _Execution(NamedTuple):
    """An instruction that runs, in which computation, how often (None: not known), and whether beside other work."""

    instruction: Instruction
    computation: Computation
    times: int | None
    beside: bool


def _executions(program: Program) -> Iterator[_Execution]:
    """Every instruction that runs, clones of one collective once."""
    return _run(Scope(program, program.computations[program.entry]), 1, False)


def _run(scope, times, beside):
    chains = set()
    for x in scope.computation.instructions.values():
        if x.opcode == "while":
            count = trip_count(scope, x)
            yield from _run(scope.body(x), None if count is None or times is None else count * times, beside)
        elif x.opcode == "fusion":
            inside = (run for called in x.called for run in _run(scope.inside(called, x), times, beside))
            yield from (run for run in inside if _is_new(run.instruction, chains))
        elif x.opcode in ("call", "call-start", "async-start"):
            for called in x.called:
                yield from _run(scope.inside(called, x), times, beside or x.opcode != "call")
        elif x.opcode == "conditional":
            for branch in x.called:
                yield from _run(Scope(scope.program, scope.program.computations[branch]), times, beside)
        else:
            apart = beside or x.opcode.endswith("-start") or x.opcode == "send" or bool(x.attribute("chain_id"))
            yield _Execution(x, scope.computation, times, apart)


def _is_new(x, chains):
    """Whether an instruction within a fusion is no clone of one in another fusion of the same computation.

    Clones have a chain. A channel alone says nothing: all collectives of a `shard_map` are on channel 1.
    """
    chain = x.attribute("chain_id")
    key = (x.opcode, x.attribute("channel_id"), chain)
    new = not chain or key not in chains
    chains.add(key)
    return new


def _collective(program, run, devices_per_slice):
    """What runs as Collective, or None."""
    x, kind = run.instruction, run.instruction.opcode.removesuffix("-start")
    if x.opcode == "send" and x.attribute("_xla_megascale_transfer_type"):
        (kind, group), crosses, operands = _between_slices(x), True, x.operands[:1]
    elif kind in KINDS:
        if kind == "all-reduce" and run.computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups, operands = replica_groups(x.attributes, program.partitions), x.operands
        crosses = devices_per_slice is not None and any(len(set(g // devices_per_slice)) > 1 for g in groups)
        group = tuple(groups[0].tolist())
    else:
        return None
    found = [array for name in operands for array in arrays(run.computation.instructions[name].shape)]
    dtype, operand_bytes = next((dtype for dtype, _ in found), ""), sum(size for _, size in found)
    return Collective(kind, dtype, operand_bytes, group, crosses, run.times, run.beside, x.name)


def _between_slices(x):
    """-> (kind, numbers of slices) of a `send` to the runtime that connects them.

    Its target "{1,3:4}x{0:255}" names the slices, then the devices.
    """
    kind = x.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
    slices, _, _ = x.attribute("_xla_megascale_target").partition("x")
    spans = [list(map(int, part.split(":"))) for part in re.findall(r"[\d:]+", slices or "{0:1}")]
    numbers = [n for span in spans for n in range(span[0], span[-1] + 1)]
    return kind.replace("one-to-one", "collective-permute"), tuple(numbers)
