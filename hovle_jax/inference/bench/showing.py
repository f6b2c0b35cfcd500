"""Figures as a JSON file, a table and a plot."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from hovle_jax.inference.bench import traffic
from hovle_jax.inference.bench.figures import Figures, milliseconds
from hovle_jax.inference.bench.subject import Subject
from hovle_jax.report import facts
from hovle_jax.report.plots import plot_over
from hovle_jax.report.progress import format_count
from hovle_jax.system.files import write_json

JSON_FILE, PLOT_FILE = "bench.json", "bench.png"
EXPLAINED = textwrap.fill(
    f"Share: of the bytes a second that a large product reads on this device, what decoding without prompts reads. "
    f"Counted: {traffic.COUNTED}. Left out: {traffic.LEFT_OUT}. A model that "
    "fits the processor's caches may pass 100%.",
    width=110,
)
HEADS = ("streams", "tile", "first token, ms", "tokens/s", "", "between tokens, ms", "share of", "programs")
HEADS_BELOW = ("", "", "p50 / p90 / p99", "a stream", "in all", "p50 / p90 / p99", "bandwidth", "compiled")


def result(subject: Subject, name: str, found: Sequence[Figures]) -> dict[str, Any]:
    """All of it, for JSON: seconds, bytes and tokens."""
    config = subject.hovle.config
    stacks = {"embedding": config.embedding.stack} if config.embedding else {}
    return {
        "model": {
            "name": name,
            "parameters": subject.parameters,
            "dtype": subject.dtype,
            "layers": {part: stack.num_layers for part, stack in (stacks | {"llm": config.llm.stack}).items()},
            "width": config.llm.stack.width,
        },
        "machine": facts.versions(),
        "command": facts.command_line(),
        "commit": facts.git_commit(),
        "bytes_counted": traffic.COUNTED,
        "bytes_left_out": traffic.LEFT_OUT,
        "cases": [dataclasses.asdict(figures) for figures in found],
    }


def write(folder: pathlib.Path, made: dict[str, Any]) -> None:
    """Replaces the JSON file."""
    write_json(folder / JSON_FILE, made)


def table(made: dict[str, Any], found: Sequence[Figures]) -> str:
    """What the terminal shows."""
    rows = [HEADS, HEADS_BELOW, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([_title(made, found[0]), *lines, EXPLAINED])


def _title(made, first):
    model, machine = made["model"], made["machine"]
    tile = "one tile and " if first.tile_size else ""
    return (
        f"{model['name']}: {format_count(model['parameters'])} parameters, {model['dtype']}: "
        f"{first.weight_bytes / 1e9:.3g} GB of weights read a token\n"
        f"{machine['device_count']} x {machine['device']}, {machine['cpu_count']} cores, jax {machine['jax']}, memory "
        f"read at {first.read_bandwidth / 1e9:.3g} GB/s\n"
        f"{tile}{first.text_tokens} tokens of text in, {first.new_tokens} tokens out"
    )


def _row(f):
    ms = lambda spread: " / ".join(milliseconds(value) for value in (spread.p50, spread.p90, spread.p99))
    share = "-" if f.share_of_bandwidth is None else f"{f.share_of_bandwidth:.0%}"
    tile = str(f.tile_size) if f.tile_size else "-"
    rates = (f"{f.tokens_per_second_a_stream:.3g}", f"{f.tokens_per_second:.3g}")
    spreads = ms(f.first_token_seconds), ms(f.between_tokens_seconds)
    return (str(f.streams), tile, spreads[0], *rates, spreads[1], share, str(f.programs_compiled))


def draw(folder: pathlib.Path, made: dict[str, Any], found: Sequence[Figures]) -> pathlib.Path:
    """The load profile: what the tile size with most streams has, over the number of streams."""
    size = max(found, key=lambda figures: figures.streams).tile_size
    shown = [figures for figures in found if figures.tile_size == size]
    spread = lambda name: {p: [1e3 * getattr(getattr(f, name), p) for f in shown] for p in ("p50", "p90", "p99")}
    decoding = [f.tokens_per_second_decoding for f in shown]
    panels = {
        "tokens/s of all streams": {
            "with prompts read between": [f.tokens_per_second for f in shown],
            "decoding alone": decoding,
        },
        "tokens/s of a stream": {"": [f.tokens_per_second_a_stream for f in shown]},
        "time to the first token, ms": spread("first_token_seconds"),
        "time between tokens, ms": spread("between_tokens_seconds"),
    }
    model, machine = made["model"], made["machine"]
    asked = f"{shown[0].prompt_tokens} tokens in, {shown[0].new_tokens} out"
    title = f"{model['name']}, {model['dtype']}, {machine['device']}: {asked}"
    return plot_over([f.streams for f in shown], panels, folder / PLOT_FILE, title, "streams")
