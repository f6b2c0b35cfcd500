"""The collectives of a compiled program: what, how many bytes, among how many devices, how many times a step.

    found = collectives(compiled.as_text(), devices_per_slice=256)
    summary(found)      # {'all-gather': Total(count=72, bytes=..., beside=..., dcn_bytes=0, unknown=0), ...}

What the text does not show at a glance, as seen in programs for TPUs:
- a loop's collectives run as often as its body (`trip_count`), nested loops multiply;
- an all-gather that overlaps with products is written several times, in a fusion that starts it, in those that it
  runs beside and in one that ends it, all under one channel and chain: it is one;
- a windowed product turns an all-gather or a reduce-scatter into a loop of collective-permutes: they are reported as
  such, and their bytes add up to the same;
- a reduce-scatter along one axis of the torus is an all-reduce in a computation `all-reduce-scatter` that keeps a part;
- what runs on a SparseCore stands in a computation of its own, which a `call-start` names;
- between slices there are no collectives but `send`s to the runtime, marked with what they are a part of.
All branches of a conditional are counted, which is an upper bound.
"""

import dataclasses
import re

from hovle_jax.aot.hlo.replica_groups import replica_groups, source_target_pairs
from hovle_jax.aot.hlo.text import Computation, Instruction, Program, parse, shape_bytes, shape_dtypes
from hovle_jax.aot.hlo.trip_count import Scope, body_scope, trip_count

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
_PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as each device runs it.

    Attributes:
      kind: of `KINDS`.
      dtype: of its first operand.
      operand_bytes: what a device puts in.
      group_size: devices that take part together.
      crosses_slices: whether a group has devices of several slices, whose traffic goes over the data-centre network.
      times: how often it runs in one execution of the program; None = in a loop whose trip count cannot be told.
      beside: whether other work can go on meanwhile: it starts and ends in two instructions, is a part of fusions that
        multiply, or runs on another core.
      name: of the instruction.
      op_name: the JAX operation that it came from.
    """

    kind: str
    dtype: str
    operand_bytes: int
    group_size: int
    crosses_slices: bool
    times: int | None
    beside: bool
    name: str
    op_name: str

    @property
    def wire_bytes(self):
        """Bytes that each device sends (and receives) when it runs once."""
        return wire_bytes(self.kind, self.operand_bytes, self.group_size)

    @property
    def bytes(self):
        """Bytes that each device sends in one execution of the program; of an unknown trip count, one iteration's."""
        return self.wire_bytes * (1 if self.times is None else self.times)


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a kind.

    Attributes:
      count: executions.
      bytes: that each device sends, those between slices included.
      beside: of these, while other work can go on.
      dcn_bytes: of these, by collectives that cross slices.
      unknown: how many have an unknown trip count, and were counted once.
    """

    count: int
    bytes: float
    beside: float
    dcn_bytes: float
    unknown: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: its name, the JAX operation that it came from, executions a step (None: not known)."""

    name: str
    op_name: str
    times: int | None


def wire_bytes(kind, operand_bytes, group_size):
    """Bytes that each of n devices sends by a ring algorithm (Patarasuk and Yuan 2009).

    (n-1)/n of the whole for a gather, a scatter and an exchange, twice that for an all-reduce (a scatter, then a
    gather), all of the operand for a permutation and a broadcast.
    """
    n = group_size
    if kind == "all-gather":
        return (n - 1) * operand_bytes
    shares = {"reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "all-to-all": (n - 1) / n}
    shares["ragged-all-to-all"] = shares["all-to-all"]
    return shares.get(kind, 1.0 if n > 1 else 0.0) * operand_bytes


def collectives(text, devices_per_slice=None):
    """The collectives of `compiled.as_text()` in the order in which they first stand there.

    Args:
      devices_per_slice: where the program is for several slices, whose devices lie one slice after the other in the
        mesh (the slices are its outermost axis).
    """
    program = parse(text)
    made = [_collective(program, run, devices_per_slice) for run in executions(program)]
    return [collective for collective in made if collective is not None]


def summary(found):
    """-> {kind: Total}."""
    kinds = {}
    for collective in found:
        kinds.setdefault(collective.kind, []).append(collective)
    return {
        kind: Total(
            count=sum(1 if c.times is None else c.times for c in of_kind),
            bytes=sum(c.bytes for c in of_kind),
            beside=sum(c.bytes for c in of_kind if c.beside),
            dcn_bytes=sum(c.bytes for c in of_kind if c.crosses_slices),
            unknown=sum(c.times is None for c in of_kind),
        )
        for kind, of_kind in kinds.items()
    }


def kernels(text):
    """The Pallas kernels that a program for TPUs calls: [Kernel]."""
    return [
        Kernel(re.sub(r"\.\d+$", "", run.instruction.name), run.instruction.quoted("op_name"), run.times)
        for run in executions(parse(text))
        if run.instruction.opcode == "custom-call" and run.instruction.quoted("custom_call_target") == _PALLAS
    ]


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction that runs, in which computation, how often (None: not known), and whether beside other work."""

    instruction: Instruction
    computation: Computation
    times: int | None
    beside: bool


def executions(program: Program):
    """Every instruction that runs -> [Execution], clones of one collective once."""
    entry = Scope(program, program.computations[program.entry], lambda number, element: None)
    return _executions(entry, 1, False)


def _executions(scope, times, beside):
    found, chains = [], set()
    for x in scope.computation.instructions.values():
        if x.opcode == "while":
            count = trip_count(scope, x)
            inner = None if count is None or times is None else count * times
            found += _executions(body_scope(scope, x), inner, beside)
        elif x.opcode == "fusion":
            inside = [run for called in x.called for run in _executions(scope.inside(called, x), times, beside)]
            found += [run for run in inside if _is_new(run.instruction, chains)]
        elif x.opcode in ("call", "call-start", "async-start"):
            apart = beside or x.opcode != "call"
            found += [run for called in x.called for run in _executions(scope.inside(called, x), times, apart)]
        elif x.opcode == "conditional":
            for branch in x.branches:
                unknown = Scope(scope.program, scope.program.computations[branch], lambda number, element: None)
                found += _executions(unknown, times, beside)
        else:
            apart = beside or x.opcode.endswith("-start") or x.opcode == "send" or bool(x.quoted("chain_id"))
            found.append(Execution(x, scope.computation, times, apart))
    return found


def _is_new(x, chains):
    """Whether an instruction within a fusion is no clone of one in another fusion of the same computation.

    Clones have a chain. A channel alone says nothing: all collectives of a `shard_map` are on channel 1.
    """
    chain = x.quoted("chain_id")
    key = (x.opcode, x.attribute("channel_id"), chain)
    new = not chain or key not in chains
    chains.add(key)
    return new


def _collective(program, run: Execution, devices_per_slice):
    """What runs as Collective, or None."""
    x = run.instruction
    if x.opcode == "send" and x.quoted("_xla_megascale_transfer_type"):
        return _between_slices(run)
    kind = x.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind == "all-reduce" and run.computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    if kind == "collective-permute":
        pairs = source_target_pairs(x.attributes)
        moves = pairs[pairs[:, 0] != pairs[:, 1]]
        groups, size = list(moves), 2 if len(moves) else 1
    else:
        groups = replica_groups(x.attributes, program.partitions)
        size = len(groups[0])
    crosses = devices_per_slice is not None and any(len(set(g // devices_per_slice)) > 1 for g in groups)
    return _made(kind, run, size, crosses, x.operands)


def _between_slices(run):
    """A `send` to the runtime that connects slices; its target "{1,2}x{0:255}" names the slices, then the devices."""
    x = run.instruction
    kind = x.quoted("_xla_megascale_transfer_type").lower().replace("_", "-")
    kind = kind.replace("one-to-one", "collective-permute")
    slices = re.match(r"\{([^}]*)\}", x.quoted("_xla_megascale_target"))
    count = sum(_span(part) for part in slices.group(1).split(",")) if slices else 2
    return _made(kind, run, count, True, x.operands[:1])


def _span(text):
    """How many numbers "3" or "0:255" names."""
    first, _, last = text.partition(":")
    return int(last) - int(first) + 1 if last else 1


def _made(kind, run, group_size, crosses_slices, operands):
    shapes = [run.computation.instructions[name].shape for name in operands]
    return Collective(
        kind=kind,
        dtype=next((dtype for shape in shapes for dtype in shape_dtypes(shape)), ""),
        operand_bytes=sum(shape_bytes(shape) for shape in shapes),
        group_size=group_size,
        crosses_slices=bool(crosses_slices),
        times=run.times,
        beside=run.beside,
        name=run.instruction.name,
        op_name=run.instruction.quoted("op_name"),
    )
