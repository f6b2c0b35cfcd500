"""Curves of a run, and of several runs, as PNG files."""

import math
import pathlib
import textwrap

from hovle_jax.report.progress import format_number

UNITS = {
    "tokens_per_second": "tokens/s",
    "step_seconds": "s",
    "seconds_per_step": "s",
    "mfu": "fraction of peak",
    "model_flops_per_second": "FLOP/s",
    "goodput": "fraction of time",
    "accuracy": "fraction right",
}
SMOOTH_FROM = 20  # points; fewer are drawn as they are, with markers
COLOR = "#2563a8"
WRONG = "#b3261e"


def plot_metrics(rows, path, title):
    """Every metric of a run in its own axis over a shared step axis, the loss first.

    Args:
      rows: what `read_metrics` returns; a metric may be missing from some rows.
      path: the PNG to write.
      title: above the picture.

    Returns:
      the path.
    """
    names = metric_names(rows)
    num_columns = min(3, max(1, len(names)))
    num_rows = max(1, math.ceil(len(names) / num_columns))
    figure = _figure(4.2 * num_columns, 2.5 * num_rows + 0.4)
    axes = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel()
    for name, axis in zip(names, axes):
        steps, values = series(rows, name)
        _draw(axis, steps, values, COLOR)
        _annotate_last(axis, steps, values)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel(UNITS.get(name, "value"), fontsize=8)
    for i, axis in enumerate(axes):
        axis.set_visible(i < len(names))
        if i + num_columns >= len(names):  # nothing below it
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelbottom=True)
    figure.suptitle(title if names else f"{title}: no metrics yet", fontsize=12)
    return _save(figure, path)


def plot_runs(runs, metric, path):
    """One metric of several runs in one axis.

    Args:
      runs: {name: rows}; a run without the metric is left out.
      metric: such as 'loss'.
      path: the PNG to write.

    Returns:
      the path.
    """
    figure = _figure(7.5, 4)
    axis = figure.subplots()
    drawn = {name: series(rows, metric) for name, rows in runs.items()}
    drawn = {name: curve for name, curve in drawn.items() if curve[0]}
    for i, (name, (steps, values)) in enumerate(drawn.items()):
        last = next((v for v in reversed(values) if math.isfinite(v)), math.nan)
        _draw(axis, steps, values, f"C{i}", label=f"{name} ({format_number(last)})")
    axis.set_xlabel("step")
    axis.set_ylabel(f"{metric} ({UNITS[metric]})" if metric in UNITS else metric)
    if drawn:
        axis.legend(frameon=False, fontsize=9, title="run (last value)", title_fontsize=8)
    return _save(figure, path)


def plot_answers(samples, path, columns=6):
    """Pictures with the question, the answer and, where it is wrong, the expected one.

    Args:
      samples: `page.Sample`s; those without a picture are left out.
      path: the PNG to write.

    Returns:
      the path.
    """
    shown = [sample for sample in samples if sample.image is not None]
    num_rows = max(1, math.ceil(len(shown) / columns))
    figure = _figure(1.8 * columns, 2.3 * num_rows)
    axes = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, sample in zip(axes, shown):
        axis.imshow(sample.image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(sample.prompt or "which caption?", 26)), fontsize=8)
        wrong = sample.right is False
        answer = f"{sample.answer}, not {sample.expected}" if wrong else sample.answer
        color = WRONG if wrong else COLOR
        axis.text(0.5, -0.04, answer, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=color)
    return _save(figure, path)


def plot_histograms(columns, path, title):
    """The distribution of each of several quantities, with its mean.

    Args:
      columns: {name: [n] numbers}.

    Returns:
      the path.
    """
    num_columns = min(3, len(columns))
    num_rows = math.ceil(len(columns) / num_columns)
    figure = _figure(4.2 * num_columns, 2.5 * num_rows + 0.4)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
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
    return _save(figure, path)


def plot_bars(values, path, title):
    """One bar for each name, the largest on top: {name: number} -> the path."""
    ordered = sorted(values.items(), key=lambda pair: pair[1])
    figure = _figure(7.5, 0.8 + 0.35 * len(ordered))
    axis = figure.subplots()
    bars = axis.barh([name for name, _ in ordered], [number for _, number in ordered], color=COLOR)
    axis.bar_label(bars, [format_number(number) for _, number in ordered], fontsize=8, padding=3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    return _save(figure, path)


def metric_names(rows):
    """All names but `step`, as first seen, with 'loss' at the front."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return sorted(names, key=lambda name: name != "loss")


def series(rows, name):
    """([step], [value]) of the rows that have the metric."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values):
    """Mean of a window of a twentieth of the points around each one; a non-finite point counts in no mean.

    The window reaches equally far to both sides and shrinks at the ends: a trailing one would lag behind the curve.
    """
    means = []
    for i in range(len(values)):
        reach = min(len(values) // 40, i, len(values) - 1 - i)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _figure(width, height):
    # Not pyplot: it keeps every figure of the process and picks a canvas by the machine's screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(axis, steps, values, color, label=None):
    """The raw line faint under its running mean; a short one as it is, with its points."""
    if len(values) < SMOOTH_FROM:
        axis.plot(steps, values, color=color, marker=".", linewidth=1.2, label=label)
    else:
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(steps, running_mean(values), color=color, linewidth=1.4, label=label)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _annotate_last(axis, steps, values):
    finite = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    if finite:
        step, value = finite[-1]
        axis.plot([step], [value], ".", color="black", markersize=4)
        # In the title's line, at the right: beside the curve it would cover it.
        axis.set_title(f"{format_number(value)} at step {step}", fontsize=8, loc="right", color="0.35")


def _save(figure, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
