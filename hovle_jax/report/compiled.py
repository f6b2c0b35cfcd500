"""What is said of programs compiled ahead of time, from what `hovle_jax.aot` writes as JSON: a report's, a plan's text.

docs/performance.md says what each line is.
"""

from collections.abc import Iterator
from typing import Any

IN_PARTS = ("train", "evaluation")  # programs that read a batch in microbatches
AS_IT_IS = "the config as it is"


def text_of(report: dict[str, Any]) -> str:
    """Of `aot.report.Report.to_dict`."""
    lines = [*_program(report), *_network(report), *(_step(report) if report["step"] else _inference(report))]
    return "\n".join([*lines, *(_forecast(report) if report["forecast"] else ())])


def gb(size: float) -> str:
    """Bytes in GB, where there are some hundredths of one, else in MB."""
    return f"{size / 1e6:.3g} MB" if 0 < size < 5e7 else f"{size / 1e9:.2f} GB"


def span(ends: Any, form: str) -> str:
    """'8.9 ... 10.1', or one number where both ends read the same."""
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low} ... {high}"


def _program(report):
    s, m = report["setting"], report["memory"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in s["mesh"].items() if size > 1) or "one device"
    yield f"{s['name']} {s['program']} on {s['topology']}: {s['devices']:,} devices, mesh {mesh}"
    how = f", in {s['microbatches']} microbatch(es), remat {s['remat']}" if s["program"] in IN_PARTS else ""
    yield f"  batch        {s['rows']:,} rows of {s['length']:,} tokens and {s['tiles']} tiles{how}"
    yield f"  compiled     in {s['compile_seconds']:.0f} s"
    parts = ", ".join(f"{name} {gb(m[name])}" for name in ("arguments", "temporaries", "results", "code"))
    parts += "".join(f"; beside it {what} {gb(size)}" for what, size in report["beside"].items())
    parts += f"; {gb(m['host'])} in the host's memory" * (m["host"] > 0) + "; DOES NOT FIT" * (not report["fits"])
    yield f"  memory       {gb(m['peak'])} of {gb(m['available'])} a device: {parts}"
    for stack, a in report["attention"].items():
        calls = f", {a['kernels']} kernel calls" if a["kernels"] else ""
        yield f"  attention    {stack}: {a['implementation']}{calls}" + f": {a['reason']}" * bool(a["reason"])


def _network(report) -> Iterator[str]:
    for kind, c in sorted(report["collectives"].items(), key=lambda item: -item[1]["bytes"]):
        more = f", {gb(c['dcn_bytes'])} of it between slices" if c["dcn_bytes"] else ""
        more += f", {c['beside'] / c['bytes']:.0%} beside other work" if c["beside"] else ""
        more += f" ({c['unknown']} in loops of unknown length, counted once)" if c["unknown"] else ""
        yield f"  network      {kind:<18} {c['count']:>7,} times, {gb(c['bytes'])}{more}"
    step = report["step"] or {"least": {}}
    if least := sum(step["least"].values()):
        asked = f"{step['excess']:.2f} x the {gb(least)} that the sharding asks for"
        yield f"  network      {gb(report['sent'])} in all, {asked}"
    between, once = sum(c["dcn_bytes"] for c in report["collectives"].values()), step["least"].get("data")
    if between and once:
        takes = f"{gb(between)} between slices, {step['dcn_seconds']:.2g} s at the published bandwidth"
        yield f"  network      {takes}, {between / once:.1f} x the {gb(once)} of gradients summed once a step"


def _step(report):
    model, hardware, bound = *(report["step"]["flops"][name] for name in ("model", "hardware")), report["step"]["bound"]
    yield f"  FLOPs        model {model:.3g}, hardware {hardware:.3g} a step"
    at_peak = f"{bound:.3g} s at the published peak, {model / hardware:.1%} MFU"
    yield f"  bound        {at_peak}: what recomputation leaves if nothing else took time, not a forecast"


def _inference(report):
    if report["hbm_seconds"] is None:
        return
    sizes, seconds = report["arguments"], report["hbm_seconds"]
    held = f"parameters {gb(sizes['params'])} and caches {gb(sizes['cache'])} a device"
    yield f"  HBM          {held}: {1000 * seconds:.3g} ms to read them once at the published bandwidth"


def _forecast(report):
    f, speed = report["forecast"], report["speed"]
    then = f", {span(speed['mfu'], '.0%')} MFU, {span(speed['tokens'], ',.0f')} tokens/s" if speed else ""
    yield f"  forecast     {span((f['low'], f['high']), '.3g')} s by the compiler's schedule{then}"
    for name in ("kind", "part"):
        told = (f"{what} {span(s, '.2g')}" for what, s in f[f"{name}s"].items() if s[1] > 0.005 * f["high"])
        yield f"  forecast     seconds by {name}: {', '.join(told)}"
    for what, share in f["unknown"].items():
        counted = "" if share is None else f", counted by its bytes: {share:.1%} of the time"
        yield f"  forecast     no estimate of {what}{counted}"


def plan_text(plan: dict[str, Any]) -> str:
    """Of `aot.plan.to_dict`: a table, what is recommended, why, and its report."""
    lines, listed = [f"{'seconds':>16} {'MFU':>12} {'memory':>11} {'sent':>11}  flags"], plan["candidates"]
    for c in listed:
        r, memory = c["report"] or {}, gb(c["memory"]) if c["memory"] else ""
        seconds = span([r["forecast"][end] for end in ("low", "high")], ".3g") if r.get("forecast") else ""
        mfu, sent = (span(r["speed"]["mfu"], ".0%"), gb(r["sent"])) if r.get("speed") else ("", "")
        lines.append(f"{seconds:>16} {mfu:>12} {memory:>11} {sent:>11}  {c['text'] or AS_IT_IS} [{c['outcome']}]")
    best = next((c for c in listed if c["text"] == plan["best"]), None)
    if best is None:
        return "\n".join([*lines, "none of these fits: take more chips"])
    return "\n".join([*lines, f"recommended: {best['text'] or AS_IT_IS}", *_why(best, listed), text_of(best["report"])])


def _why(best, listed):
    """Against the config as it is, or against the next best where it is the best."""
    fit = (c for c in listed if c is not best and c["outcome"] == "fits" and (not c["text"] or not best["text"]))
    if (other := next(fit, None)) is None:
        return ["  it is the only one that fits" if best["text"] else "  nothing else fits"]
    ours, theirs = (c["report"]["forecast"] for c in (best, other))
    middle = lambda forecast: (forecast["low"] + forecast["high"]) / 2
    of_kind = lambda forecast, name: sum(forecast["kinds"].get(name, (0, 0))) / 2
    kinds = ours["kinds"] | theirs["kinds"]
    changes = ", ".join(f"{name} {of_kind(ours, name) - of_kind(theirs, name):+.2g} s" for name in kinds)
    less = f"{1 - middle(ours) / middle(theirs):.0%} less time than {other['text'] or AS_IT_IS}"
    return [f"  {less}, by the middle of both", f"  {changes}"]
