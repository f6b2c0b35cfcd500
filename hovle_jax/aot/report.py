"""What a compiled program tells about itself: memory, attention, network, and how fast it can be at best."""

import dataclasses
import math

from hovle_jax.aot.hlo import collectives
from hovle_jax.aot.least_traffic import Traffic, least_traffic, parameter_counts
from hovle_jax.aot.roofline import Roofline, hbm_bytes, network_bytes, roofline
from hovle_jax.config import RunConfig
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import GENERATIONS, Topology
from hovle_jax.model.attention import choose
from hovle_jax.report.progress import format_count
from hovle_jax.training.flops import StepFlops
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find

# Component -> the module whose name stands in the operations of its stack.
STACKS = {"embedding": "HolisticEmbedding", "llm": "LanguageModel", "teacher": "VisionTeacher"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device while the program runs.

    Attributes:
      arguments: parameters, optimizer state, batch; a result that takes an argument's place counts once.
      results: the others.
      temporaries, code: as they say.
      host: temporaries in the host's memory.
      available: the memory that the device has.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    host: int
    available: float

    @property
    def peak(self):
        return self.arguments + self.results + self.temporaries + self.code

    @property
    def fits(self):
        return self.peak <= self.available


@dataclasses.dataclass(frozen=True)
class Attention:
    """How a stack attends: `kernels` is how many calls of a kernel the program has, `reason` why not what was asked."""

    implementation: str
    reason: str
    kernels: int


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a topology.

    Attributes:
      name: 'instruct:hovle'.
      program: 'train', 'prefill' or 'decode'.
      slices, devices: how many there are, over all slices.
      mesh: {axis: size}.
      rows, length, tiles, parts: of the global batch, and in how many parts a step reads it.
      attention: {component: Attention}.
      flops, least, bounds: of a training step; None for other programs, of which no FLOPs are counted.
      collectives: {kind: collectives.Total}, bytes that each device sends.
      compile_seconds: lowering included.
    """

    name: str
    program: str
    topology: str
    slices: int
    devices: int
    mesh: dict
    rows: int
    length: int
    tiles: int
    parts: int
    remat: str
    memory: Memory
    attention: dict
    collectives: dict
    flops: StepFlops | None
    least: Traffic | None
    bounds: Roofline | None
    compile_seconds: float

    @property
    def sent(self):
        """Bytes that a device sends in a step."""
        return sum(total.bytes for total in self.collectives.values())

    @property
    def excess(self):
        """What is sent over the least that must be; NaN where nothing must."""
        least = self.least.fsdp + self.least.data if self.least else 0
        return self.sent / least if least else math.nan

    @property
    def beside(self):
        """The share of what is sent while other work can go on; NaN where nothing is sent."""
        return sum(total.beside for total in self.collectives.values()) / self.sent if self.sent else math.nan

    def to_dict(self):
        """For JSON, with what follows from the fields."""
        made = dataclasses.asdict(self)
        made["memory"] |= {"peak": self.memory.peak, "fits": self.memory.fits}
        made["sent"] = self.sent
        made["beside"] = None if math.isnan(self.beside) else self.beside
        if self.bounds:
            made["bounds"] |= {"seconds": self.bounds.seconds, "bottleneck": self.bounds.bottleneck}
            made["excess"] = None if math.isnan(self.excess) else self.excess
        return made


def report(config: RunConfig, run: Run, compiled, topology: Topology, slices, program, seconds) -> Report:
    """Reads a compiled program -> Report.

    Args:
      run: that it was lowered for; seconds: how long it took to compile.
    """
    text = compiled.as_text()
    mesh = run.placement.mesh
    devices = mesh.size
    found = collectives.collectives(text, devices // slices)
    attention = _attention(config, run, collectives.kernels(text))
    flops = least = bounds = None
    if program == "train":
        flops = flops_of(config, run.models.execution.attention)
        least = least_traffic(find(config.stage), run)
        per_chip = GENERATIONS[topology.generation].devices_per_chip
        ici, dcn = network_bytes(found, per_chip)
        bounds = bounds_of(config, run, topology, slices, ici, dcn)
    return Report(
        name=f"{config.stage}:{config.preset}",
        program=program,
        topology=topology.cloud_name,
        slices=slices,
        devices=devices,
        mesh=dict(mesh.shape),
        rows=config.data.batch_size,
        length=config.data.sequence_length,
        tiles=config.data.tiles,
        parts=run.accumulate,
        remat=config.execution.remat,
        memory=_memory(compiled.memory_analysis(), topology),
        attention=attention,
        collectives=collectives.summary(found),
        flops=flops,
        least=least,
        bounds=bounds,
        compile_seconds=seconds,
    )


def flops_of(config: RunConfig, attention: str) -> StepFlops:
    """FLOPs of a step with this implementation of attention (resolved)."""
    implementation, _ = choose(attention, config.model.llm.stack.head_dim)
    logits_kept = not config.execution.vocab_chunk
    return find(config.stage).step_flops(config, attention=implementation, logits_kept=logits_kept)


def bounds_of(config: RunConfig, run: Run, topology: Topology, slices, ici, dcn) -> Roofline:
    """The roofline of a step in which each chip sends so many bytes within its slice and to others."""
    chips, counts = topology.chips * slices, parameter_counts(find(config.stage), run)
    flops = flops_of(config, run.models.execution.attention)
    hbm = hbm_bytes(config, chips, *counts, microbatches=run.accumulate)
    return roofline(flops, chip_of(topology.generation), chips, hbm, ici, dcn, topology)


def _attention(config: RunConfig, run: Run, kernels):
    """{component: Attention} of the decoder stacks and the teacher's tower."""
    stage, models, made = find(config.stage), run.models, {}
    for component in (c for c in stage.components if c in STACKS and c not in stage.partial):
        if component == "teacher":
            vision = config.teacher.vision
            chosen = choose(models.execution.attention, vision.width // vision.num_heads, masked=False)
        else:
            chosen = choose(models.execution.attention, getattr(config.model, component).stack.head_dim)
        calls = sum(STACKS[component] in kernel.op_name for kernel in kernels)
        made[component] = Attention(*chosen, kernels=calls)
    return made


def _memory(stats, topology):
    per_chip = GENERATIONS[topology.generation].devices_per_chip
    return Memory(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_temp_size_in_bytes,
        available=chip_of(topology.generation).hbm_bytes / per_chip,
    )


def text_of(report: Report):
    """The report for people."""
    memory, gb = report.memory, lambda size: f"{size / 1e9:.2f} GB"
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    where = f"{report.slices} slices of {report.topology}" if report.slices > 1 else report.topology
    read = f"{report.rows:,} rows of {report.length:,} tokens and {report.tiles} tiles, in {report.parts} part(s)"
    lines = [
        f"{report.name} {report.program} on {where}: {report.devices:,} devices, mesh {mesh}",
        f"  batch        {read}, remat {report.remat}",
        f"  compiled     in {report.compile_seconds:.0f} s",
        f"  memory       {gb(memory.peak)} of {gb(memory.available)} a device: arguments {gb(memory.arguments)}, "
        f"temporaries {gb(memory.temporaries)}, results {gb(memory.results)}, code {gb(memory.code)}"
        + f"; {gb(memory.host)} in the host's memory" * (memory.host > 0)
        + ("" if memory.fits else "; DOES NOT FIT"),
    ]
    for stack, attention in report.attention.items():
        calls = f", {attention.kernels} kernel calls" if attention.kernels else ""
        why = f": {attention.reason}" if attention.reason else ""
        lines.append(f"  attention    {stack}: {attention.implementation}{calls}{why}")
    for kind, total in sorted(report.collectives.items(), key=lambda item: -item[1].bytes):
        beyond = f", {gb(total.dcn_bytes)} of it between slices" if total.dcn_bytes else ""
        beyond += f", {total.beside / total.bytes:.0%} beside other work" if total.beside else ""
        unknown = f" ({total.unknown} in loops of unknown length, counted once)" if total.unknown else ""
        lines.append(f"  network      {kind:<18} {total.count:>7,} times, {gb(total.bytes)}{beyond}{unknown}")
    if report.bounds is None:
        return "\n".join(lines)
    if report.least.fsdp + report.least.data:
        least = gb(report.least.fsdp + report.least.data)
        lines.append(f"  network      {gb(report.sent)} in all, {report.excess:.2f} x the {least} that must be sent")
    flops, bounds = report.flops, report.bounds
    times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in bounds.times.items())
    tokens = report.rows * report.length / bounds.seconds
    return "\n".join(
        lines
        + [
            f"  FLOPs        model {flops.model:.3g}, hardware {flops.hardware:.3g} a step",
            f"  seconds      at the peaks of the chip: {times}",
            f"  at best      {bounds.mfu:.1%} MFU, {format_count(tokens)} tokens/s; bound by {bounds.bottleneck}",
        ]
    )
