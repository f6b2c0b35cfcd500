"""What a compiled program tells about itself: memory, attention, network, FLOPs, and how long it takes.

Two kinds of seconds: such as no step can beat, by its chips' peaks, and a forecast by the compiler's schedule.
"""

import dataclasses
from typing import Any

import jax

from hovle_jax.aot.forecasting import Forecast, forecast
from hovle_jax.aot.hlo import collectives, work
from hovle_jax.aot.program import Program
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.attention import choose
from hovle_jax.model.transformer import keeps_logits
from hovle_jax.training.flops import StepFlops
from hovle_jax.training.stages import find
from hovle_jax.training.traffic import least_traffic

# Component -> the module whose name stands in the operations of its stack.
STACKS = {"embedding": "HolisticEmbedding", "llm": "LanguageModel", "teacher": "VisionTeacher"}
PARTS = {module: name for name, module in STACKS.items()} | {work.LOSS: "head and loss", work.REST: "optimizer"}


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a topology; bytes are those of a device."""

    setting: dict[str, Any]  # what was compiled, and compile_seconds, lowering included
    arguments: dict[str, int]
    # While it runs: arguments, temporaries, results (those that take no argument's place) and code are the peak,
    # available is what it has; host: temporaries in the host's memory.
    memory: dict[str, float]
    beside: dict[str, int]  # what else a run holds meanwhile
    attention: dict[str, dict[str, Any]]  # {component: implementation that runs, reason, kernels that are called}
    collectives: dict[str, collectives.Total]
    sent: float
    step: dict[str, Any] | None  # of a training step, see `step_of`
    hbm_seconds: float | None  # of prefill and decode: parameters and caches read once, at the published bandwidth
    forecast: Forecast | None = None
    speed: dict[str, tuple[float, float]] | None = None  # of a step: MFU, and tokens a second of all devices

    @property
    def fits(self) -> bool:
        return self.memory["peak"] + sum(self.beside.values()) <= self.memory["available"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def read(compiled: jax.stages.Compiled, program: Program, seconds: float, with_forecast: bool = True) -> Report:
    """Reads a compiled program; for a forecast kernels that were not seen before are compiled once more, alone.

    Args:
      seconds: that it took to compile.
    """
    text, config, run, target = compiled.as_text() or "", program.config, program.run, program.target
    mesh, data, chip, sizes = run.placement.mesh, config.data, chip_of(target.generation), program.sizes
    found = collectives.collectives(text, mesh.size // target.slices)
    predicted = forecast(compiled, PARTS) if with_forecast else None
    step, hbm, speed = None, None, None
    if program.kind == "train":
        implementation, _ = choose(run.models.execution.attention, config.model.llm.stack.head_dim)
        logits_kept = not config.execution.vocab_chunk or keeps_logits(config.execution.remat)
        flops = find(config.stage).step_flops(config, attention=implementation, logits_kept=logits_kept)
        step = step_of(flops, least_traffic(config, run), target, found)
        speed = predicted and speed_of(predicted, flops, target, data.batch_size * data.sequence_length)
    elif "cache" in sizes:
        hbm = (sizes["params"] + sizes["cache"]) * target.kind.devices_per_chip / chip.hbm_bandwidth
    setting = {"name": f"{config.stage}:{config.preset}", "program": program.kind, "topology": target.name}
    setting |= {"slices": target.slices, "devices": mesh.size, "mesh": dict(mesh.shape), "rows": data.batch_size}
    setting |= {"length": data.sequence_length, "tiles": data.tiles, "microbatches": run.accumulate}
    return Report(
        setting=setting | {"remat": config.execution.remat, "compile_seconds": seconds},
        arguments=sizes,
        memory=_memory(compiled.memory_analysis(), chip.hbm_bytes / target.kind.devices_per_chip),
        beside=program.beside,
        attention=_attention(config, run, program.kind, collectives.kernels(text)),
        collectives=collectives.summary(found),
        sent=sum(c.bytes for c in found),
        step=step,
        hbm_seconds=hbm,
        forecast=predicted,
        speed=speed,
    )


def _memory(stats, available):
    parts = {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes}
    parts |= {"results": stats.output_size_in_bytes - stats.alias_size_in_bytes}
    parts |= {"code": stats.generated_code_size_in_bytes}
    return parts | {"peak": sum(parts.values()), "available": available, "host": stats.host_temp_size_in_bytes}


def step_of(flops: StepFlops, least: dict[str, float], target: Topology, found: list) -> dict[str, Any]:
    """Of a training step with these collectives.

    Returns:
      flops, least (see `least_traffic`), excess (all that is sent over the least, None where nothing must be), bound:
      seconds of the hardware FLOPs at the published bf16 peak; dcn_seconds: of what goes between slices, at theirs.
    """
    chip, total = chip_of(target.generation), sum(least.values())
    beyond = sum(c.bytes for c in found if c.crosses_slices) * target.kind.devices_per_chip
    made = {"flops": dataclasses.asdict(flops), "least": least, "dcn_seconds": beyond / chip.dcn_bandwidth}
    return made | {
        "excess": sum(c.bytes for c in found) / total if total else None,
        "bound": flops.hardware / (target.chips * target.slices * chip.bf16_flops),
    }


def speed_of(predicted: Forecast, flops: StepFlops, target: Topology, tokens: int) -> dict[str, tuple[float, float]]:
    """See `Report`; tokens: of a step."""
    both = lambda amount: (amount / predicted.high, amount / predicted.low)
    peak = target.chips * target.slices * chip_of(target.generation).bf16_flops
    return {"mfu": both(flops.model / peak), "tokens": both(tokens)}


def _attention(config, run, program, operations):
    """Of the decoder stacks and the teacher's tower: what was chosen, and whether the program has kernels of it."""
    stage, made = find(config.stage), {}
    asked, whole = run.models.execution.attention, program != "decode"  # over caches a mask is not whole
    for component in (c for c in stage.components if c in STACKS and c not in stage.partial):
        is_decoder, vision = component != "teacher", config.teacher and config.teacher.vision
        head_dim = getattr(config.model, component).stack.head_dim if is_decoder else vision.width // vision.num_heads
        chosen, reason = choose(asked, head_dim, masked=is_decoder, whole=whole)
        calls = sum(STACKS[component] in operation for operation in operations)
        if chosen == "splash" and not calls:
            chosen, reason = "xla", "splash attention was chosen, and the program has none of its kernels"
        made[component] = {"implementation": chosen, "reason": reason, "kernels": calls}
    return made
