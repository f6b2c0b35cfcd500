"""How long a compiled program takes on TPUs, from the schedule that libtpu made: no TPU is needed.

    compiled = jax.jit(step).lower(*abstract_arguments).compile()      # for a TPU topology, see docs/forecast.md
    forecast(compiled).low, forecast(compiled).high                    # seconds

The program is walked through as the chip would run it. docs/forecast.md has the method, its limits, how far off it is.
"""

import collections
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hovle_jax.aot import kernels
from hovle_jax.aot.hlo import work
from hovle_jax.aot.hlo.collectives import PALLAS, inside
from hovle_jax.aot.hlo.text import parse
from hovle_jax.aot.hlo.trip_count import Scope, trip_count, value
from hovle_jax.aot.machine import Machine
from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Forecast:
    """How long one execution of a program takes, in seconds."""

    low: float  # memory and matrix units have their published peaks, kernels do their main block alone
    high: float  # as libtpu estimates, and all blocks in each step of a kernel
    kinds: dict[str, tuple[float, float]]  # of work; adds up to the whole
    parts: dict[str, tuple[float, float]]  # of the model, too
    unknown: dict[str, float | None]  # {what has no estimate: share of the high time by its bytes; None: as it says}

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


def forecast(compiled: jax.stages.Compiled, parts: Mapping[str, str] | None = None) -> Forecast:
    """Any jitted function that was compiled for TPUs. Takes seconds, and some more for each kernel seen first.

    Args:
      parts: names to show in place of those of Flax modules, 'loss' and 'rest'.
    Raises:
      UserError: the program is not one of libtpu, or for a chip of which no figures are known.
    """
    machine = Machine.of(compiled)
    module = compiled.runtime_executable().hlo_modules()[0]
    options = sys.modules[type(module).__module__].HloPrintOptions()
    options.print_large_constants = True  # which blocks a kernel's mask lets it skip
    return of_text(module.to_string(options), machine, lambda call: kernels.schedule(call, machine.topology), parts)


def of_text(text: str, machine: Machine, schedule: Callable, parts: Mapping[str, str] | None = None) -> Forecast:
    """As `forecast`, of a program's text; schedule: of a kernel's call, or None."""
    program, names = parse(text), parts or {}
    walk = _Walk(machine, schedule)
    spent = walk.through(Scope(program, program.computations[program.entry]), 1)
    if not walk.estimates:
        raise UserError("the program has no estimates of libtpu's: compile it for a TPU topology")
    low, high = map(float, _total(spent))
    by = lambda index: _sums((names.get(key[index], key[index]), seconds) for key, seconds in spent.items())
    shares = {what: seconds and float(seconds / high) for what, seconds in walk.unknown.items()}
    listed = {what: share for what, share in shares.items() if share is None or share >= 1e-3}
    return Forecast(low, high, by(0), by(1), listed)


def _total(spent):
    return sum(spent.values(), np.zeros(2))


def _sums(pairs):
    """-> {name: (low, high)}, longest first."""
    sums = collections.defaultdict(lambda: np.zeros(2))
    for name, seconds in pairs:
        sums[name] = sums[name] + seconds
    return {name: (float(s[0]), float(s[1])) for name, s in sorted(sums.items(), key=lambda item: -item[1][1])}


class _Timeline:
    """Seconds that one computation spends, and what goes on beside it over the network."""

    def __init__(self):
        self.spent = collections.defaultdict(lambda: np.zeros(2))  # {(kind, part): [low, high]}
        self.ends = {}  # when what goes on beside is done
        self._now, self._links_free = np.zeros(2), np.zeros(2)

    def spend(self, kind, part, seconds):
        self.spent[kind, part] = self.spent[kind, part] + seconds
        self._now = self._now + seconds

    def start(self, name, seconds, on_links=True):
        """The links carry one transfer after the other; SparseCores do other work beside them."""
        if not on_links:
            self.ends[name] = self._now + seconds
        elif name not in self.ends:
            self.ends[name] = self._links_free = np.maximum(self._now, self._links_free) + seconds

    def wait(self, name, part):
        self.spend(work.NETWORK, part, np.maximum(self.ends.get(name, self._now) - self._now, 0))


class _Walk:
    """Attributes: `unknown`, as in Forecast, but seconds; `estimates`, how many instructions have one."""

    def __init__(self, machine, schedule):
        self._machine, self._schedule = machine, schedule
        self.unknown: dict[str, Any] = collections.defaultdict(float)
        self.estimates = 0

    def through(self, scope: Scope, times: int) -> dict[tuple[str, str], np.ndarray]:
        """The seconds of a computation, run once; `times` that it runs in all are for `unknown`."""
        line, part = _Timeline(), work.REST
        for x in scope.computation.instructions.values():
            part = work.part_of(x) or part  # the compiler drops some paths: what stands beside belongs together
            inner, count = {}, 1
            if x.opcode == "while":
                count = trip_count(scope, x)
                if count is None:
                    self.unknown[f"{x.name}: a loop of unknown length, counted once"], count = None, 1
                inner = self.through(scope.body(x), times * count)
            elif x.opcode in ("call", "conditional"):
                inner = max(
                    (self.through(scope.inside(name, x), times) for name in x.called), key=lambda s: _total(s)[1]
                )
            elif x.opcode not in work.FREE:
                self._one(scope, x, line, part, times)
            for (kind, of), seconds in inner.items():
                line.spend(kind, of, seconds * count)
        return dict(line.spent)

    def _one(self, scope, x, line, part, times):
        """An instruction that is no loop."""
        collectives = inside(scope, x, len(self._machine.places) // self._machine.topology.slices)
        seconds, target = sum(map(self._machine.seconds, collectives)), x.attribute("custom_call_target")
        chains = _chains(scope.program, x) if x.opcode == "fusion" else []
        for chain in chains:  # a gather beside matmuls is written in several fusions
            line.start(chain, seconds / len(chains))
            if x.name.startswith("async-collective-done"):
                line.wait(chain, part)
        if x.opcode.endswith("-done"):
            line.wait(x.operands[0], part)
        elif x.opcode.endswith("-update"):
            line.ends[x.name] = line.ends.get(x.operands[0], 0.0)
        elif x.opcode.endswith("-start") or x.opcode == "send":
            line.start(x.name, seconds if collectives else self._by_bytes(scope, x, times), bool(collectives))
        elif collectives and not chains:
            line.spend(work.NETWORK, part, seconds)
        elif target == PALLAS:
            line.spend(work.KERNELS, part, self._kernel(scope, x, times))
        elif target not in work.FREE_CALLS:
            (kind, flops), cycles = work.kind_of(scope, x), work.cycles(x)
            self.estimates += cycles is not None
            if cycles is not None:
                line.spend(kind, part, self._machine.estimated(cycles, flops))
            elif not chains:
                line.spend(kind, part, self._by_bytes(scope, x, times))

    def _kernel(self, scope, x, times):
        found = self._schedule(kernels.call_of(scope.computation, x))
        if found is None:
            return self._by_bytes(scope, x, times)
        self.estimates += 1
        if found.loops:
            self.unknown[f"{_stem(x)}: loops in a step, counted once"] = None
        steps = found.steps * self._unmasked(scope, x)
        return np.asarray([found.longest, found.bundles]) * steps / self._machine.clock

    def _unmasked(self, scope, x):
        """The share of a kernel's steps that its mask does not let it skip: splash attention's second operand."""
        is_mask = "splash" in x.name and scope.computation.instructions[x.operands[1]].shape.startswith("s8[")
        blocks = [int(n) for n in re.findall(r"-?\d+", str(value(scope, x.operands[1])) if is_mask else "1")]
        if not blocks:
            self.unknown[f"{_stem(x)}: its mask, taken as full"] = None
        return np.count_nonzero(blocks) / len(blocks) if blocks else 1.0

    def _by_bytes(self, scope, x, times):
        seconds = self._machine.moved(work.memory_bytes(scope.computation, x))
        self.unknown[_stem(x)] += seconds * times
        return np.full(2, seconds)


def _chains(program, x):
    """Of the collectives within a fusion that have parts in others."""
    called = (y for name in x.called for y in program.computations[name].instructions.values())
    return list(dict.fromkeys(chain for y in called if (chain := y.attribute("chain_id"))))


def _stem(x):
    return re.sub(r"[.\d]+$", "", x.name)
