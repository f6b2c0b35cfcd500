"""The fastest way to run a step that fits: one thing is changed at a time, and stays where the forecast falls."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hovle_jax.aot.compiling import TooLarge, compile_for
from hovle_jax.aot.program import Program
from hovle_jax.aot.report import Report
from hovle_jax.config import RunConfig
from hovle_jax.hardware.compiler_options import SCOPED_VMEM
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.transformer import LOGITS, MATMULS, OUTPUT, keeps_logits
from hovle_jax.sharding.matmul import SMALL_SLICE
from hovle_jax.training.stages import find

MOST = 8  # that are compiled
AT_ONCE = 2  # a compilation keeps one core busy
COPIES, NETWORK = 4, 0.1  # of the model in a slice: tried where the network takes this share of the time
VOCAB_CHUNK = 8448
GROWTH = 0.75  # of a step's temporaries: what a microbatch of twice the rows needs more, at least
WORTH = 0.03  # of the time that twice the rows must save, or four times as many are not tried


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way, and what is known of it."""

    flags: dict[str, Any]  # that ask for it: fields of the execution, and 'mesh'
    outcome: str  # 'fits' or 'too large'; or why it was not compiled
    memory: float | None = None  # bytes of a device, where the compiler has said them
    report: Report | None = None  # of one that compiles

    @property
    def seconds(self) -> float:  # the middle of its forecast
        return self.report.forecast.middle if self.report and self.report.forecast else math.inf

    @property
    def of_network(self) -> float:  # its share of the forecast; 1 without one
        return sum(self.report.forecast.kinds.get("network", (0, 0))) / 2 / self.seconds if self.fits else 1.0

    @property
    def fits(self) -> bool:
        return self.outcome == "fits"

    @property
    def text(self) -> str:  # the flags as a command takes them
        return " ".join(f"--config.{key}={value}" for key, value in self.flags.items())


def make(config: RunConfig, target: Topology, say: Callable[[str], None] = print) -> list[Candidate]:
    """Compiles the config as it is, then at most MOST - 1 others, two at a time: fastest first.

    Raises:
      UserError: the config cannot run on the target.
    """
    Program.of(config, target)
    started, left_out = {}, []
    changes = [_less, _less, _matmuls, _rows, _rows, _logits, _vector_memory, _mesh]
    after = lambda flags, change: flags | (change(with_flags(config, flags), target) or {})
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:

        def start(flags):
            if (key := str(flags)) not in started and len(started) < MOST:
                started[key] = pool.submit(_compiled, with_flags(config, flags), target, flags, say)
            return started.get(key)

        as_it_is, _ = start({}), start(after({}, _matmuls))
        best = as_it_is.result()
        while changes:
            change = changes.pop(0)
            if best.of_network < NETWORK and _mesh in changes:
                changes.remove(_mesh)
            if best.fits == (change is _less):  # what fits takes no less, what does not, no more
                continue
            flags, m = after(best.flags, change), best.report.memory if best.report else {}
            if change is _rows and flags != best.flags and m["peak"] + GROWTH * m["temporaries"] > m["available"]:
                left_out.append(Candidate(flags, "not compiled: its rows do not fit"))
            elif flags != best.flags and (tried := start(flags)):
                # Meanwhile what comes next if this one stays; of more rows it is not known yet whether they fit.
                following = [each for each in changes if each is not _rows or change is not _rows][:1]
                if following and change is not _less and following != [_rows]:
                    start(after(flags, *following))
                before, best = best, best_first([best, tried.result()])[0] if best.fits else tried.result()
                if change is _rows and _rows in changes and best.seconds > (1 - WORTH) * before.seconds:
                    changes.remove(_rows)
    return best_first([*(each.result() for each in started.values()), *left_out])


def with_flags(config: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """The config as the flags change it."""
    for key, value in flags.items():
        group, field = key.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})
    return config


# -- what is changed, in this order: {flag: value}, or None where it is so already or cannot be


def _less(config, target):
    """For what does not fit: a row and few logits at a time, layers made again; then of inputs that the host keeps."""
    e, stage = config.execution, find(config.stage)
    smallest: dict[str, Any] = {"execution.remat": "full", "execution.accumulate": -1}
    if "llm" in stage.result and (e.vocab_chunk or config.model.llm.table_rows) > VOCAB_CHUNK:
        smallest["execution.vocab_chunk"] = VOCAB_CHUNK
    if with_flags(config, smallest) != config and e.remat != "offload":
        return smallest
    return {"execution.remat": "offload"} if e.remat == "full" else None


def _matmuls(config, target):
    """No matmul of a layer is made again but that of attention's output, which costs as much as to keep it."""
    names = [name for name in MATMULS.split(",") if name not in (OUTPUT, LOGITS)]
    return {"execution.remat": ",".join(names)} if config.execution.remat in ("dots", "full", "offload") else None


def _rows(config, target):
    """Twice the rows in a microbatch: half as many gathers and sums over the network, larger matmuls."""
    count = Program.of(config, target).run.accumulate
    return {"execution.accumulate": count // 2} if count % 2 == 0 else None


def _logits(config, target):
    e = config.execution
    again = e.vocab_chunk and "llm" in find(config.stage).result and "," in e.remat and not keeps_logits(e.remat)
    return {"execution.remat": f"{e.remat},{LOGITS}"} if again else None


def _vector_memory(config, target):
    return {"execution.scoped_vmem": not config.execution.scoped_vmem} if target.generation in SCOPED_VMEM else None


def _mesh(config, target):
    """Copies of the model: fewer chips gather together, and gradients are summed over copies once a step."""
    sizes = Program.of(config, target).run.placement.mesh.shape
    is_plain = sizes["fsdp"] == target.chips * target.kind.devices_per_chip >= SMALL_SLICE * COPIES
    return {"mesh.data": COPIES * target.slices, "mesh.fsdp": sizes["fsdp"] // COPIES} if is_plain else None


def best_first(made: list[Candidate]) -> list[Candidate]:
    """The one place that orders candidates: those that fit by the middle of their forecast, then the others."""
    return sorted(made, key=lambda candidate: (not candidate.fits, candidate.seconds))


def to_dict(listed: list[Candidate]) -> dict[str, Any]:
    """For JSON: the recommended flags (None: nothing fits; '': the config as it is), and all candidates."""
    best, keys = best_first(listed)[0], ("text", "outcome", "memory")
    rows = [{key: getattr(c, key) for key in keys} | {"report": c.report and c.report.to_dict()} for c in listed]
    return {"best": best.text if best.fits else None, "candidates": rows}


def _compiled(config, target, flags, say):
    name = " ".join(f"{key}={value}" for key, value in flags.items()) or "the config as it is"
    say(f"compiling {name}")
    try:
        report = compile_for(config, target)
        made = Candidate(flags, "fits" if report.fits else "too large", report.memory["peak"], report)
    except TooLarge as error:
        made = Candidate(flags, "too large", memory=error.needed)
    say(f"{name}: {made.outcome}" + f", {made.seconds:.3g} s" * made.fits)
    return made
