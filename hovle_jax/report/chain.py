"""The page of a work folder: the result and cost of each stage of the chain, with a link to its own report."""

import html
import os
import pathlib
import tempfile
import urllib.parse
from typing import Any

from hovle_jax.report.html import figure, grid, section, table, write
from hovle_jax.report.page import FILE_NAME
from hovle_jax.report.plots import plot_stages
from hovle_jax.report.progress import format_count, format_number
from hovle_jax.report.runs import Run, runs_in
from hovle_jax.system.progress import format_duration

HEAD = ["stage", "result", "loss", "steps", "parameters", "tokens", "images", "time"]


def write_chain(workdir: str | os.PathLike) -> pathlib.Path | None:
    """Writes `workdir/report.html` about the runs in it, finished or not -> its path; None without a run."""
    workdir = pathlib.Path(workdir)
    runs = runs_in(workdir)
    if not runs:
        return None
    presets = ", ".join(dict.fromkeys(run.config["preset"] for run in runs.values()))
    sections = [
        section("Stages", grid(HEAD, [_row(name, run) for name, run in runs.items()])),
        section("Together", table(_together(runs), "about")),
        section("Losses", _losses(runs)),
        section("Answers", _answers(runs)),
    ]
    return write(workdir / FILE_NAME, f"hovle_jax: the stages of {workdir.absolute().name} ({presets})", sections)


def _row(name: str, run: Run) -> list[str]:
    link = html.escape(name)
    if (run.folder / FILE_NAME).is_file():
        link = f'<a href="{urllib.parse.quote(name)}/{FILE_NAME}">{link}</a>'
    loss, count = run.final_loss(), lambda value: "" if value is None else format_count(value)
    return [
        link,
        html.escape(run.headline()) if run.finished else "not finished",
        "" if loss is None else format_number(loss),
        f"{run.step:,}" if run.finished else f"{run.step:,} of {run.config['steps']:,}",
        _parameters(run.facts),
        count(run.last("tokens_seen")),
        count(run.last("images_seen")),
        format_duration(run.wall_seconds),
    ]


def _parameters(facts: dict[str, Any]) -> str:
    if "parameters_trained" not in facts:
        return ""
    frozen = facts["parameters_frozen"]
    return format_count(facts["parameters_trained"]) + (f" + {format_count(frozen)} frozen" if frozen else "")


def _together(runs: dict[str, Run]) -> dict[str, str]:
    found = {"time": format_duration(sum(run.wall_seconds for run in runs.values()))}
    for name in ("tokens", "images"):
        found[f"{name} seen"] = format_count(sum(run.last(f"{name}_seen") or 0 for run in runs.values()))
    commits = dict.fromkeys(run.facts["commit"] for run in runs.values() if run.facts.get("commit"))
    return found | ({"commit": ", ".join(commits)} if commits else {})


def _losses(runs: dict[str, Run]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = plot_stages({name: run.rows for name, run in runs.items()}, pathlib.Path(folder) / "losses.png")
        return figure(path, "Each stage has a different loss, so the heights do not compare.")


def _answers(runs: dict[str, Run]) -> str:
    """The answers of the last stage that has any."""
    answered = [name for name, run in runs.items() if (run.folder / "answers.png").is_file()]
    return figure(runs[answered[-1]].folder / "answers.png", f"Answers of {answered[-1]}.") if answered else ""
