"""How long a compiled program takes on TPUs, from the schedule that libtpu made: no TPU is needed.

    compiled = jax.jit(step).lower(*abstract_arguments).compile()      # for a TPU topology, see docs/forecast.md
    forecast(compiled).low, forecast(compiled).high                    # seconds

The program is walked through as the chip would run it: an instruction takes the cycles that libtpu expects of it, a
kernel those of its own schedule, a collective the time that its links take. What starts and ends in two instructions
goes on beside those between them. docs/forecast.md has the method, its limits and how far off it is.
"""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hovle_jax.aot import kernels
from hovle_jax.aot.hlo import work
from hovle_jax.aot.hlo.collectives import inside
from hovle_jax.aot.hlo.text import Instruction, Program, parse
from hovle_jax.aot.hlo.trip_count import Scope, trip_count, value
from hovle_jax.aot.machine import Machine
from hovle_jax.errors import UserError

_LEAST_LISTED = 1e-3  # share of the time of what is listed without an estimate


@dataclasses.dataclass(frozen=True)
class Forecast:
    """How long one execution of a program takes.

    Attributes:
      low, high: seconds. Low: what streams through memory does so at the chip's published bandwidth, and a step of a
        kernel's grid does nothing but its main block. High: as libtpu estimates, and all blocks in every step.
      kinds: {kind of work: (low, high)} and parts: {part of the model: (low, high)}; each adds up to the whole.
      unknown: {what has no estimate: share of the high time that it counts by its bytes}. nan: counted as nothing.
    """

    low: float
    high: float
    kinds: dict[str, tuple[float, float]]
    parts: dict[str, tuple[float, float]]
    unknown: dict[str, float]

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def forecast(compiled: jax.stages.Compiled, parts: Mapping[str, str] | None = None) -> Forecast:
    """Any jitted function that was compiled for TPUs. Takes seconds, and some more for each kernel seen first.

    Args:
      parts: names to show in place of those of Flax modules, 'loss' and 'rest'.
    Raises:
      UserError: the program is not one of libtpu, or for a chip of which no figures are known.
    """
    machine = Machine.of(compiled)
    return of_text(_text(compiled), machine, parts, lambda call: kernels.schedule(call, machine.topology))


def of_text(
    text: str,
    machine: Machine,
    parts: Mapping[str, str] | None = None,
    schedule: Callable[[dict], kernels.Schedule | None] = lambda call: None,
) -> Forecast:
    """As `forecast`, of `compiled.as_text()`; schedule: of a kernel's call."""
    program = parse(text)
    walk = _Walk(machine, schedule)
    spent = walk.through(Scope(program, program.computations[program.entry]), 1)
    if not walk.estimates:
        raise UserError("the program has no estimates of libtpu's: compile it for a TPU topology")
    total, names = sum(spent.values(), np.zeros(2)), parts or {}
    by = lambda index: _sums((names.get(key[index], key[index]), seconds) for key, seconds in spent.items())
    shares = {what: float(seconds / total[1]) for what, seconds in walk.unknown.items()}
    listed = {what: share for what, share in shares.items() if not share < _LEAST_LISTED}
    return Forecast(float(total[0]), float(total[1]), by(0), by(1), listed)


def _text(compiled):
    """With all constants written out, among them which blocks a kernel's mask lets it skip."""
    module = compiled.runtime_executable().hlo_modules()[0]
    options = sys.modules[type(module).__module__].HloPrintOptions()
    options.print_large_constants = True
    return module.to_string(options)


def _sums(pairs):
    """-> {name: (low, high)}, longest first."""
    sums = collections.defaultdict(lambda: np.zeros(2))
    for name, seconds in pairs:
        sums[name] = sums[name] + seconds
    return {name: tuple(map(float, sums[name])) for name in sorted(sums, key=lambda name: -sums[name][1])}


class _Timeline:
    """Seconds that one computation spends, and what goes on beside it over the network."""

    def __init__(self):
        self.spent = collections.defaultdict(lambda: np.zeros(2))  # {(kind, part): [low, high]}
        self.now, self._links_free, self._ends = np.zeros(2), np.zeros(2), {}

    def spend(self, kind, part, seconds):
        self.spent[kind, part] = self.spent[kind, part] + seconds
        self.now = self.now + seconds

    def start(self, name, seconds):
        """A transfer over the links, which carry one after the other."""
        if name not in self._ends:
            self._links_free = self._ends[name] = np.maximum(self.now, self._links_free) + seconds

    def beside(self, name, seconds):
        """Work of another core."""
        self._ends[name] = self.now + seconds

    def rename(self, name, now):
        self._ends[now] = self._ends.get(name, self.now)

    def wait(self, name, part):
        if name in self._ends:
            self.spend(work.NETWORK, part, np.maximum(self._ends[name] - self.now, 0))

    def add(self, spent, times):
        for (kind, part), seconds in spent.items():
            self.spend(kind, part, seconds * times)


class _Walk:
    """Attributes: `unknown`, {what has no estimate: seconds that it counts by its bytes}; `estimates`, how many do."""

    def __init__(self, machine, schedule):
        self.machine, self._schedule = machine, schedule
        self.unknown, self.estimates = collections.Counter(), 0

    def through(self, scope: Scope, times: int) -> dict[tuple[str, str], np.ndarray]:
        """The seconds of a computation, run once; `times` that it runs in all are for `unknown`."""
        line, part = _Timeline(), work.REST
        for x in scope.computation.instructions.values():
            part = work.part_of(x) or part  # the compiler drops some paths: what stands beside belongs together
            if x.opcode == "while":
                count = trip_count(scope, x)
                if count is None:
                    self.unknown[f"{x.name}: a loop of unknown length, counted once"] = math.nan
                line.add(self.through(scope.body(x), times * (count or 1)), count or 1)
            elif x.opcode in ("call", "conditional"):
                branches = [self.through(scope.inside(name, x), times) for name in x.called]
                line.add(max(branches, key=lambda spent: sum(spent.values(), np.zeros(2))[1]), 1)
            elif x.opcode not in work.FREE:
                self._one(scope, x, line, part, times)
        return dict(line.spent)

    def _one(self, scope, x, line, part, times):
        """An instruction that is no loop."""
        collectives = inside(scope, x, self.machine.devices_per_slice)
        seconds = sum(map(self.machine.seconds, collectives))
        chains = _chains(scope.program, x)
        for chain in chains:  # a gather beside matmuls is written in several fusions
            line.start(chain, seconds / len(chains))
            if x.name.startswith("async-collective-done"):
                line.wait(chain, part)
        if x.opcode.endswith("-done"):
            line.wait(x.operands[0], part)
        elif x.opcode.endswith("-update"):
            line.rename(x.operands[0], x.name)
        elif x.opcode.endswith("-start") and not collectives:
            line.beside(x.name, self._by_bytes(scope, x, times))
        elif x.opcode.endswith("-start") or x.opcode == "send":
            line.start(x.name, seconds)
        elif collectives and not chains:
            line.spend(work.NETWORK, part, seconds)
        elif x.attribute("custom_call_target") == kernels.TARGET:
            line.spend(work.KERNELS, part, self._kernel(scope, x, times))
        elif x.attribute("custom_call_target") not in work.FREE_CALLS:
            line.spend(work.kind_of(scope.program, x), part, self._work(scope, x, times, bool(chains)))

    def _work(self, scope, x, times, is_network):
        """[low, high] seconds of a core."""
        cycles = work.cycles(x)
        if cycles is None:
            return np.zeros(2) if is_network else self._by_bytes(scope, x, times)
        self.estimates += 1
        high = cycles / self.machine.clock
        is_matmul = work.kind_of(scope.program, x) == work.MATMUL
        return np.asarray([high if is_matmul else high / self.machine.streaming, high])

    def _kernel(self, scope, x, times):
        found = self._schedule(kernels.call_of(scope.computation, x))
        if found is None:
            return self._by_bytes(scope, x, times)
        self.estimates += 1
        if found.loops:
            self.unknown[f"{_stem(x)}: loops in a step, counted once"] = math.nan
        steps = found.steps * self._unmasked(scope, x) / (self.machine.cores if found.parallel else 1)
        return np.asarray([found.longest, found.bundles]) * steps / self.machine.clock

    def _unmasked(self, scope, x):
        """The share of a kernel's steps that its mask does not let it skip: splash attention's second operand."""
        is_mask = "splash" in x.name and scope.computation.instructions[x.operands[1]].shape.startswith("s8[")
        text = str(value(scope, x.operands[1])) if is_mask else "1"
        blocks = [int(n) for n in re.findall(r"-?\d+", text)]
        if not blocks:
            self.unknown[f"{_stem(x)}: its mask, taken as full"] = math.nan
        return np.count_nonzero(blocks) / len(blocks) if blocks else 1.0

    def _by_bytes(self, scope, x, times):
        seconds = work.memory_bytes(scope.computation, x) / self.machine.memory_bandwidth
        self.unknown[_stem(x)] += seconds * times
        return np.full(2, seconds)


def _chains(program: Program, x: Instruction) -> list[str]:
    """Of the collectives within a fusion that have parts in others."""
    called = (y for name in x.called for y in program.computations[name].instructions.values())
    return list(dict.fromkeys(chain for y in called if (chain := y.attribute("chain_id"))))


def _stem(x):
    return re.sub(r"[.\d]+$", "", x.name)
