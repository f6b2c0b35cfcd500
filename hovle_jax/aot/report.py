"""What a compiled program tells about itself: memory, attention, network, FLOPs, and how long it takes.

Two kinds of seconds: such as no step can beat, by its chips' peaks, and a forecast by the compiler's schedule.
"""

import dataclasses
from typing import Any

import jax

from hovle_jax.aot.forecasting import Forecast, forecast
from hovle_jax.aot.hlo import collectives, work
from hovle_jax.aot.least_traffic import least_traffic
from hovle_jax.aot.program import Program
from hovle_jax.config import RunConfig
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import Topology
from hovle_jax.model.attention import choose
from hovle_jax.model.transformer import keeps_logits
from hovle_jax.training.flops import StepFlops
from hovle_jax.training.setup import Run
from hovle_jax.training.stages import find

# Component -> the module whose name stands in the operations of its stack.
STACKS = {"embedding": "HolisticEmbedding", "llm": "LanguageModel", "teacher": "VisionTeacher"}
PARTS = {module: name for name, module in STACKS.items()} | {work.LOSS: "head and loss", work.REST: "optimizer"}

IN_PARTS = ("train", "evaluation")  # programs that read a batch in microbatches


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
        flops = flops_of(config, run)
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


def flops_of(config: RunConfig, run: Run) -> StepFlops:
    """FLOPs of a training step as it runs."""
    implementation, _ = choose(run.models.execution.attention, config.model.llm.stack.head_dim)
    logits_kept = not config.execution.vocab_chunk or keeps_logits(config.execution.remat)
    return find(config.stage).step_flops(config, attention=implementation, logits_kept=logits_kept)


def step_of(flops: StepFlops, least: dict[str, float], target: Topology, found: list) -> dict[str, Any]:
    """Of a training step with these collectives.

    Returns:
      flops, least (see `least_traffic`), excess (all that is sent over the least, None where nothing must be), bound:
      seconds of the hardware FLOPs at the published bf16 peak; dcn_seconds: of what goes between slices, at theirs.
    """
    chip, total = chip_of(target.generation), sum(least.values())
    beyond = sum(c.bytes for c in found if c.crosses_slices) * target.kind.devices_per_chip
    made = {"flops": dataclasses.asdict(flops), "least": least}
    made |= {"excess": sum(c.bytes for c in found) / total if total else None}
    return made | {"bound": flops.hardware / _peak(target), "dcn_seconds": beyond / chip.dcn_bandwidth}


def speed_of(predicted: Forecast, flops: StepFlops, target: Topology, tokens: int) -> dict[str, tuple[float, float]]:
    """See `Report`; tokens: of a step."""
    both = lambda amount: (amount / predicted.high, amount / predicted.low)
    return {"mfu": both(flops.model / _peak(target)), "tokens": both(tokens)}


def _peak(target):
    return target.chips * target.slices * chip_of(target.generation).bf16_flops


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


def text_of(report: Report) -> str:
    """The report for people; docs/performance.md says what each line is."""
    lines = [*_program(report), *_network(report), *(_step(report) if report.step else _inference(report))]
    return "\n".join([*lines, *(_forecast(report) if report.forecast else ())])


def gb(size: float) -> str:
    """Bytes in GB, where there are some hundredths of one, else in MB."""
    return f"{size / 1e6:.3g} MB" if 0 < size < 5e7 else f"{size / 1e9:.2f} GB"


def _program(r):
    s, m = r.setting, r.memory
    mesh = " x ".join(f"{axis}={size}" for axis, size in s["mesh"].items() if size > 1) or "one device"
    yield f"{s['name']} {s['program']} on {s['topology']}: {s['devices']:,} devices, mesh {mesh}"
    how = f", in {s['microbatches']} microbatch(es), remat {s['remat']}" if s["program"] in IN_PARTS else ""
    yield f"  batch        {s['rows']:,} rows of {s['length']:,} tokens and {s['tiles']} tiles{how}"
    yield f"  compiled     in {s['compile_seconds']:.0f} s"
    parts = ", ".join(f"{name} {gb(m[name])}" for name in ("arguments", "temporaries", "results", "code"))
    parts += "".join(f"; beside it {what} {gb(size)}" for what, size in r.beside.items())
    parts += f"; {gb(m['host'])} in the host's memory" * (m["host"] > 0) + "; DOES NOT FIT" * (not r.fits)
    yield f"  memory       {gb(m['peak'])} of {gb(m['available'])} a device: {parts}"
    for stack, a in r.attention.items():
        calls = f", {a['kernels']} kernel calls" if a["kernels"] else ""
        yield f"  attention    {stack}: {a['implementation']}{calls}" + f": {a['reason']}" * bool(a["reason"])


def _network(r):
    for kind, total in sorted(r.collectives.items(), key=lambda item: -item[1].bytes):
        more = f", {gb(total.dcn_bytes)} of it between slices" if total.dcn_bytes else ""
        more += f", {total.beside / total.bytes:.0%} beside other work" if total.beside else ""
        more += f" ({total.unknown} in loops of unknown length, counted once)" if total.unknown else ""
        yield f"  network      {kind:<18} {total.count:>7,} times, {gb(total.bytes)}{more}"
    least = r.step["least"] if r.step else {}
    if sum(least.values()):
        asked = f"{r.step['excess']:.2f} x the {gb(sum(least.values()))} that the sharding asks for"
        yield f"  network      {gb(r.sent)} in all, {asked}"
    between = sum(total.dcn_bytes for total in r.collectives.values())
    if between and least.get("data"):
        takes = f"{gb(between)} between slices, {r.step['dcn_seconds']:.2g} s at the published bandwidth"
        once = f"{between / least['data']:.1f} x the {gb(least['data'])} of gradients summed once a step"
        yield f"  network      {takes}, {once}"


def _step(r):
    model, hardware = r.step["flops"]["model"], r.step["flops"]["hardware"]
    yield f"  FLOPs        model {model:.3g}, hardware {hardware:.3g} a step"
    bound = f"{r.step['bound']:.3g} s at the published peak, {model / hardware:.1%} MFU"
    yield f"  bound        {bound}: what recomputation leaves if nothing else took time, not a forecast"


def _inference(r):
    if r.hbm_seconds is None:
        return
    held = f"parameters {gb(r.arguments['params'])} and caches {gb(r.arguments['cache'])} a device"
    yield f"  HBM          {held}: {1000 * r.hbm_seconds:.3g} ms to read them once at the published bandwidth"


def _forecast(r):
    f, speed = r.forecast, r.speed
    then = f", {span(speed['mfu'], '.0%')} MFU, {span(speed['tokens'], ',.0f')} tokens/s" if speed else ""
    yield f"  forecast     {span((f.low, f.high), '.3g')} s by the compiler's schedule{then}"
    for name, parts in (("kind", f.kinds), ("part", f.parts)):
        told = ", ".join(f"{what} {span(s, '.2g')}" for what, s in parts.items() if s[1] > 0.005 * f.high)
        yield f"  forecast     seconds by {name}: {told}"
    for what, share in f.unknown.items():
        counted = "" if share is None else f", counted by its bytes: {share:.1%} of the time"
        yield f"  forecast     no estimate of {what}{counted}"


def span(ends: tuple[float, float], form: str) -> str:
    """'8.9 ... 10.1', or one number where both ends read the same."""
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low} ... {high}"
