"""Curves of a run, and of several runs, as PNG files."""

import math
import os
import pathlib
import textwrap

from hovle_jax.report.figures import figure_of, save_figure
from hovle_jax.report.metrics import HELD_OUT
from hovle_jax.report.progress import SUFFIXES, format_number

UNITS = {
    "tokens_per_second": "tokens/s",
    "step_seconds": "s",
    "seconds_per_step": "s",
    "mfu": "fraction of peak",
    "model_flops_per_second": "FLOP/s",
    "goodput": "fraction of time",
    "accuracy": "fraction right",
    "learning_rate": "rate",
    "gradient_norm": "norm",
}
SMOOTH_FROM = 20  # points; fewer are drawn as they are, with markers
LINE_FROM = 3  # points; a line through two would suggest steps that were not measured
PANEL = (4.2, 2.5)  # inches
ANSWER_WIDTH = 26  # characters under an image
COLOR = "#2563a8"
HELD_OUT_COLOR = "#b45309"
RIGHT, WRONG = "#18794e", "#c0362c"  # the page's


def plot_metrics(rows: list[dict], path: str | os.PathLike, title: str) -> pathlib.Path:
    """Every metric of a run in its own panel, the loss first; a held-out metric is in the panel of its training metric.

    Args:
      rows: what `read_metrics` returns; a metric may be missing from some rows.
      path: the PNG to write.
      title: printed above the panels.

    Returns:
      the path.
    """
    names = [name for name in metric_names(rows) if name.removeprefix(HELD_OUT) == name or not _pair(rows, name)]
    figure, axes = _panels(len(names))
    last_step = max((row["step"] for row in rows), default=0)
    for name, axis in zip(names, axes):
        _draw(axis, *series(rows, name), COLOR)
        held_out = series(rows, HELD_OUT + name)
        if held_out[0]:
            _draw(axis, *held_out, HELD_OUT_COLOR, label="held out")
            axis.legend(frameon=False, fontsize=8)
        _annotate_last(axis, *series(rows, name))
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel(unit_of(name), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.set_xlim(-0.03 * last_step, 1.03 * last_step or None)
    figure.suptitle(title if names else f"{title}: no metrics yet", fontsize=12)
    return save_figure(figure, path)


def plot_stages(stages: dict[str, list[dict]], path: str | os.PathLike) -> pathlib.Path:
    """The loss of each stage of a chain, side by side: {stage: rows} -> the path."""
    figure, axes = _panels(len(stages))
    for (stage, rows), axis in zip(stages.items(), axes):
        _draw(axis, *series(rows, "loss"), COLOR)
        _draw(axis, *series(rows, HELD_OUT + "loss"), HELD_OUT_COLOR, label="held out")
        if series(rows, HELD_OUT + "loss")[0]:
            axis.legend(frameon=False, fontsize=8)
        _annotate_last(axis, *series(rows, "loss"))
        axis.set_title(stage, fontsize=10, loc="left")
        axis.set_ylabel("loss", fontsize=8)
        axis.set_xlabel("step", fontsize=8)
    return save_figure(figure, path)


def plot_comparison(
    panels: dict[str, tuple[str, dict[str, list[dict]]]],
    path: str | os.PathLike,
    colors: dict[str, str] | None = None,
) -> pathlib.Path:
    """Curves of several runs over each other, in one panel or more.

    Args:
      panels: {title: (metric, {run: rows})}; a run without the metric is left out.
      path: the PNG to write.
      colors: {run: a matplotlib colour}; None = one for each run.

    Returns:
      the path.
    """
    figure, axes = _panels(len(panels), columns=2, size=(6.5, 3.8))
    for (title, (metric, runs)), axis in zip(panels.items(), axes):
        drawn = {name: series(rows, metric) for name, rows in runs.items()}
        drawn = {name: curve for name, curve in drawn.items() if curve[0]}
        for i, (name, (steps, values)) in enumerate(drawn.items()):
            last = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
            _draw(axis, steps, values, (colors or {}).get(name, f"C{i}"), label=f"{name} ({format_number(last)})")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(unit_of(metric), fontsize=8)
        if drawn:
            axis.legend(frameon=False, fontsize=8, title="run (last value)", title_fontsize=8)
    return save_figure(figure, path)


def plot_answers(samples: list, path: str | os.PathLike, columns: int = 6) -> pathlib.Path:
    """Images with the question, the answer and, where it is wrong, the expected one.

    Args:
      samples: `page.Sample`s; those without an image are left out.
      path: the PNG to write.

    Returns:
      the path.
    """
    shown = [sample for sample in samples if sample.image is not None]
    num_rows = max(1, math.ceil(len(shown) / columns))
    figure = figure_of(1.8 * columns, 2.5 * num_rows)
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, sample in zip(axes, shown):
        axis.imshow(sample.image, interpolation="nearest")
        axis.set_title(_lines(sample.prompt or "which caption?", 2), fontsize=8)
        answer = _lines(sample.answer or "(empty)", 1)
        if sample.right is False:
            answer += "\n" + _lines(f"not {sample.expected}", 1)
        color = {True: RIGHT, False: WRONG, None: "black"}[sample.right]
        axis.text(0.5, -0.04, answer, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=color)
    return save_figure(figure, path)


def _lines(text, most):
    """The text wrapped to the width of an image, truncated to `most` lines."""
    return "\n".join(textwrap.wrap(text, ANSWER_WIDTH, max_lines=most, placeholder=" ..."))


def plot_histograms(columns: dict, path: str | os.PathLike, title: str) -> pathlib.Path:
    """The distribution of each of several quantities, with its mean.

    Args:
      columns: {name: [n] numbers}.

    Returns:
      the path.
    """
    figure, axes = _panels(len(columns))
    for (name, values), axis in zip(columns.items(), axes):
        whole = all(float(v).is_integer() for v in values) and max(values) - min(values) < 60
        bins = [k - 0.5 for k in range(int(min(values)), int(max(values)) + 2)] if whole else 40
        axis.hist(values, bins=bins, color=COLOR)
        mean = sum(map(float, values)) / len(values)
        axis.axvline(mean, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_title(f"mean {format_number(mean)}", fontsize=8, loc="right", color="0.35")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_bars(values: dict[str, float], path: str | os.PathLike, title: str) -> pathlib.Path:
    """One bar for each name, the largest on top: {name: number} -> the path."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    figure = figure_of(7.5, 0.8 + 0.35 * len(ordered))
    axis = figure.subplots()
    bars = axis.barh([name for name, _ in ordered], [number for _, number in ordered], color=COLOR)
    axis.bar_label(bars, [format_number(number) for _, number in ordered], fontsize=8, padding=3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    return save_figure(figure, path)


def plot_over(
    points: list[int], panels: dict[str, dict[str, list]], path: str | os.PathLike, title: str, axis_name: str
) -> pathlib.Path:
    """Quantities over a few sizes that double, each point marked and named below.

    Args:
      panels: {title: {label: [a number, or None, for each point]}}; one curve may do without a label.
      axis_name: what the points are.

    Returns:
      the path.
    """
    figure, axes = _panels(len(panels), columns=2, size=(4.6, 2.8))
    for (name, curves), axis in zip(panels.items(), axes):
        for label, values in curves.items():
            known = [(at, value) for at, value in enumerate(values) if value is not None]
            axis.plot([at for at, _ in known], [value for _, value in known], marker=".", linewidth=1.2, label=label)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xticks(range(len(points)), [str(point) for point in points])
        axis.set_xlim(-0.3, len(points) - 0.7)
        axis.set_ylim(0)
        axis.set_xlabel(axis_name, fontsize=8)
        axis.yaxis.set_major_formatter(format_tick)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if any(curves):
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def metric_names(rows: list[dict]) -> list[str]:
    """All names but `step`, as first seen, with 'loss' at the front."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return sorted(names, key=lambda name: name != "loss")


def unit_of(metric: str) -> str:
    """The label of a metric's axis: its unit, or its name where it has none."""
    name = metric.removeprefix(HELD_OUT)
    return UNITS.get(name) or ("cosine" if name.endswith("_cosine") else name)


def _pair(rows, name):
    """Whether the rows have the training metric of a held-out one."""
    return bool(series(rows, name.removeprefix(HELD_OUT))[0])


def series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """([step], [value]) of the rows that have the metric."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: list[float]) -> list[float]:
    """The mean around each point, over a twentieth of all points; non-finite ones are left out.

    The window is symmetric and shrinks at the ends: a trailing window would lag the curve.
    """
    means = []
    for i in range(len(values)):
        reach = min(len(values) // 40, i, len(values) - 1 - i)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _panels(count, columns=3, size=PANEL):
    """-> (figure, `count` axes of one size, each with its own scales)."""
    columns = min(columns, max(1, count))
    rows = max(1, math.ceil(count / columns))
    figure = figure_of(size[0] * columns, size[1] * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def format_tick(value: float, position: int | None = None) -> str:
    """200000000000 -> '200G', 0.0004 -> '0.0004': complete at each tick, without an exponent above the axis."""
    if abs(value) >= 1e4:
        size, suffix = next((pair for pair in SUFFIXES if abs(value) >= pair[0]))
        return f"{value / size:.4g}{suffix}"
    return f"{value:.6g}"


def _draw(axis, steps, values, color, label=None):
    """A long curve faint under its running mean; a short one with markers; one or two points alone."""
    if len(values) < LINE_FROM:
        axis.plot(steps, values, "o", color=color, markersize=5, label=label)
    elif len(values) < SMOOTH_FROM:
        axis.plot(steps, values, color=color, marker=".", linewidth=1.2, label=label)
    else:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(steps, running_mean(values), color=color, linewidth=1.4, label=label)
    axis.yaxis.set_major_formatter(format_tick)
    axis.xaxis.set_major_formatter(format_tick)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _annotate_last(axis, steps, values):
    finite = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    if finite:
        step, value = finite[-1]
        # On the title's line: at the curve's end it would cover the curve.
        axis.set_title(f"{format_tick(float(f'{value:.4g}'))} at step {step}", fontsize=8, loc="right", color="0.35")
