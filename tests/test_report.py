"""The report: what it writes is whole after a kill, marks the right tokens, and is safe to open."""

import dataclasses
import json
import math
import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.report import batch_images, facts, page, plots
from hovle_jax.report.metrics import MetricsWriter, read_metrics
from hovle_jax.report.progress import Progress, format_number
from hovle_jax.system.progress import format_duration, track

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def write_steps(folder, steps, resume_step=0, loss=1.0):
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": loss})


def tensorboard_scalars(folder):
    """{step: value} of 'loss' over all event files, in the order of their writing."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                if not value.HasField("image"):
                    found[event.step] = value.simple_value
            data = data[16 + size :]
    return found


def test_metrics_are_json_lines_and_tensorboard_scalars(tmp_path):
    write_steps(tmp_path, [1, 2], loss=0.5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert tensorboard_scalars(tmp_path) == {1: 0.5, 2: 0.5}


def test_resume_drops_what_the_killed_run_wrote_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, [10, 20, 30, 40])
    write_steps(tmp_path, [30, 40, 50], resume_step=20, loss=2.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert [row["loss"] for row in rows] == [1, 1, 2, 2, 2]
    assert tensorboard_scalars(tmp_path) == {10: 1, 20: 1, 30: 2, 40: 2, 50: 2}


def test_a_new_run_starts_the_file_anew(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [5])
    assert [row["step"] for row in read_metrics(tmp_path)] == [5]


def test_a_truncated_last_line_is_dropped_and_written_again(tmp_path):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_metrics(tmp_path)] == [10]
    write_steps(tmp_path, [20, 30], resume_step=20)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_a_second_write_of_a_step_joins_its_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1})
        writer.write(2, {"loss": 2})
        writer.write(2, {"accuracy": 0.5})
        writer.write(3, {"loss": 3})
        with pytest.raises(ValueError, match="step 2"):
            writer.write(2, {"loss": 2})
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(3, {"accuracy": 0.75})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2, "accuracy": 0.5},
        {"step": 3, "loss": 3, "accuracy": 0.75},
    ]


def test_a_non_finite_number_stays_valid_json(tmp_path):
    write_steps(tmp_path, [1], loss=math.nan)
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def test_progress_line_with_a_faked_clock():
    now = [100.0]  # the compiling step took until here and must not count
    progress = Progress("distill", 600, first_step=100, tokens_per_step=1180, clock=lambda: now[0])
    assert progress.line(101, {"loss": -1.0}) == "distill   101/600  16%  loss -1.000  - tok/s  -:-- left"
    progress.started()
    now[0] += 13.9  # 139 steps at 0.1 s
    values = {"loss": -1.913, "image_cosine": 0.931, "lr": 2.1e-4}
    assert progress.line(240, values) == (
        "distill   240/600  40%  loss -1.913  image_cosine 0.931  lr 2.1e-04  11.8k tok/s  0:00:36 left"
    )


def test_progress_lines_stay_aligned():
    progress = Progress("instruct", 1000, 0, 0)
    lines = [progress.line(20, {"loss": -10.25}), progress.line(1000, {"loss": 0.5})]
    assert lines[0].index("left") == lines[1].index("left")
    assert "tok/s" not in lines[0]
    assert "1000/1000 100%" in lines[1]


def test_numbers_have_the_digits_that_matter():
    assert [format_number(x) for x in (0, 0.0, -1.9126, 12345.67, 2.1e-4, np.int32(7))] == [
        "0", "0.000", "-1.913", "12345.7", "2.1e-04", "7",
    ]  # fmt: skip


def test_durations_always_have_hours():
    assert format_duration(41) == "0:00:41"
    assert format_duration(3 * 3600 + 59.7) == "3:01:00"


def test_long_work_says_how_far_it_is_and_not_too_often():
    lines, times = [], iter(range(1000))
    assert list(track(range(100), lines.append, "x", "images", 100, clock=lambda: next(times))) == list(range(100))
    assert len(lines) == 20 and lines[0] == "x: 5 of 100 images   5%  0:01:35 left"


def test_how_far_chunks_of_work_are():
    lines, times = [], iter(range(0, 1000, 10))
    chunks = [range(i, i + 1000) for i in range(0, 4000, 1000)]
    assert list(track(chunks, lines.append, "x", "samples", 4000, size=len, clock=lambda: next(times))) == chunks
    assert lines[1] == "x: 2,000 of 4,000 samples  50%  0:00:20 left" and lines[-1].endswith("100%  0:00:00 left")


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def open_image(path):
    image = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20, f"{path} is blank"
    return image


def test_plots_are_images_of_a_sane_size(tmp_path):
    rows = [{"step": i, "loss": 3 / (i + 1), "lr": 1e-3} for i in range(60)]
    rows[30]["loss"] = math.nan
    rows[-1]["accuracy"] = 0.9
    height, width, _ = open_image(plots.plot_metrics(rows, tmp_path / "new" / "metrics.png", "a run")).shape
    assert 1000 < width < 2000 and 200 < height < 800
    height, width, _ = open_image(
        plots.plot_comparison({"loss": ("loss", {"a": rows, "b": rows[:9]})}, tmp_path / "runs.png")
    ).shape
    assert 600 < width < 2000 and 300 < height < 1000


def panels(monkeypatch):
    """The figures that are saved from here on."""
    saved = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def test_panels_have_one_size_their_own_numbers_and_no_labels_in_each_other(tmp_path, monkeypatch):
    saved = panels(monkeypatch)
    rows = [{"step": i, "loss": 3.0, "model_flops_per_second": 1e11 + i * 1e9, "learning_rate": 4e-4 / i, "goodput": 1}
            for i in range(1, 60)]  # fmt: skip
    plots.plot_metrics(rows, tmp_path / "metrics.png", "a run")
    axes = [axis for axis in saved[0].axes if axis.get_visible()]
    assert len(axes) == 4
    sizes = np.array([axis.get_position().size for axis in axes])
    assert np.ptp(sizes, axis=0).max() < 0.01
    for axis in axes:
        assert axis.yaxis.get_offset_text().get_text() == axis.xaxis.get_offset_text().get_text() == ""
        assert any(label.get_text() for label in axis.get_xticklabels()) and axis.get_xlabel() == "step"
    assert [axis.get_ylabel() for axis in axes] == ["loss", "FLOP/s", "rate", "fraction of time"]
    assert plots.format_tick(1.5e11) == "150G" and plots.format_tick(4e-4) == "0.0004"
    assert plots.format_tick(-0.2) == "-0.2" and plots.format_tick(2500) == "2500"


def test_held_out_points_lie_in_the_panel_of_their_metric_and_two_are_no_line(tmp_path, monkeypatch):
    saved = panels(monkeypatch)
    rows = [{"step": i, "loss": 1 / (i + 1), "held_out/other": 1.0} for i in range(5)]
    rows[0]["held_out/loss"] = rows[4]["held_out/loss"] = 0.5
    plots.plot_metrics(rows, tmp_path / "metrics.png", "a run")
    loss, other = [axis for axis in saved[0].axes if axis.get_visible()]
    trained, held_out = loss.get_lines()
    assert trained.get_linestyle() == "-" and held_out.get_linestyle() == "None" and held_out.get_marker() == "o"
    assert held_out.get_xdata().tolist() == [0, 4] and held_out.get_label() == "held out"
    assert other.get_title(loc="left") == "held_out/other"


def test_answers_have_the_colours_of_the_page_and_room(tmp_path, monkeypatch):
    from hovle_jax.report.html import STYLE

    saved = panels(monkeypatch)
    image = np.full((8, 8, 3), 200, np.uint8)
    right = page.Sample(image, "which caption is it of all that there are?", "a red circle", "a red circle")
    wrong = page.Sample(image, "", "a green rectangle", "a yellow rectangle, or so " * 9)
    plots.plot_answers([right, wrong], tmp_path / "answers.png")
    first, second = [axis.texts[0] for axis in saved[0].axes[:2]]
    assert first.get_color() == plots.RIGHT in STYLE and second.get_color() == plots.WRONG in STYLE
    assert second.get_text().startswith("a green rectangle\nnot a yellow")
    boxes = [text.get_window_extent() for text in (first, second)]
    assert boxes[0].x1 < boxes[1].x0


def test_answers_fill_rows_of_images(tmp_path):
    sample = page.Sample(np.full((8, 8, 3), 200, np.uint8), "what color is the shape in the image?", "red", "blue")
    without_image = dataclasses.replace(sample, image=None)
    size = lambda samples: open_image(plots.plot_answers(samples, tmp_path / "answers.png")).shape
    one_row, two_rows = size([sample, without_image]), size([sample] * 7)
    assert two_rows[1] == one_row[1] and two_rows[0] == pytest.approx(2 * one_row[0], abs=2)
    assert size([sample] * 6 + [without_image] * 6) == one_row


def test_plots_of_a_run_that_has_logged_nothing(tmp_path):
    assert plots.plot_metrics([], tmp_path / "empty.png", "a run").exists()
    assert plots.plot_comparison({"loss": ("loss", {"a": []})}, tmp_path / "empty_runs.png").exists()


def test_loss_comes_first_and_the_running_mean_does_not_lag():
    rows = [{"step": 1, "lr": 0.1}, {"step": 2, "loss": 1.0, "lr": 0.1}]
    assert plots.metric_names(rows) == ["loss", "lr"]
    assert plots.series(rows, "loss") == ([2], [1.0])
    straight = [float(i) for i in range(200)]
    assert plots.running_mean(straight) == pytest.approx(straight)
    assert plots.running_mean([math.nan if i == 50 else 1.0 for i in range(200)]) == [1.0] * 200


# ---------------------------------------------------------------------------------------------------------------------
# Images of a batch

WORDS = ["<pad>", "<s>", "<IMG_CONTEXT>", "what?", "red", "<end>", "blue"]


def decode(ids):
    return [WORDS[i] for i in ids]


def answer_batch():
    """A row with one of two tiles used: <s> 4x<IMG_CONTEXT> what? red <end>, then padding."""
    tokens = np.array([[1, 2, 2, 2, 2, 3, 4, 5, 0, 0]], np.int32)
    weights = np.zeros((1, 10), np.float32)
    weights[0, 5:7] = 1  # at 'what?' and 'red', which predict 'red' and '<end>'
    tiles = np.zeros((1, 2, 8, 8, 3), np.uint8)
    tiles[0, 0] = 200
    return {
        "tokens": tokens,
        "segment_ids": (tokens > 0).astype(np.int32),
        "positions": np.arange(10, dtype=np.int32)[None],
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": weights,
        "tiles": tiles,
        "image_positions": np.array([[1, 2, 3, 4, 10, 10, 10, 10]], np.int32),
    }


def kinds(batch, row=0):
    return [(piece.text, piece.kind) for piece in batch_images.row_pieces(batch, row, decode)]


def test_the_marked_token_is_the_target_and_image_runs_collapse():
    assert kinds(answer_batch()) == [
        ("<s>", "plain"),
        ("<IMG_CONTEXT> x4", "image"),
        ("what?", "plain"),
        ("red", "trained"),
        ("<end>", "trained"),
    ]


def test_targets_that_are_not_the_next_token_are_shown():
    batch = answer_batch()
    batch["targets"][0, 5] = 6
    batch["loss_weights"][0, 7] = 1
    assert kinds(batch)[3:] == [
        ("red (target: blue)", "mismatch"),
        ("<end>", "trained"),
        ("(past the end, target: <pad>)", "mismatch"),
    ]


def test_distillation_marks_the_positions_themselves():
    batch = answer_batch()
    del batch["targets"], batch["loss_weights"]
    batch["text_weights"] = np.eye(10, dtype=np.float32)[[5]]
    batch["image_weights"] = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    assert kinds(batch)[1:4] == [
        ("<IMG_CONTEXT> x2", "trained"),
        ("<IMG_CONTEXT> x2", "image"),
        ("what?", "trained"),
    ]


def test_captions_of_contrast_end_at_their_end_token():
    for padding in (0, 5):
        batch = {"tokens": np.array([[1, 4, 5, padding, padding]]), "tiles": np.zeros((1, 1, 8, 8, 3), np.uint8)}
        assert kinds(batch) == [("<s>", "plain"), ("red", "plain"), ("<end>", "plain")]
        assert len(batch_images.row_tiles(batch, 0)) == 1


def test_only_used_tiles_are_shown():
    tiles = batch_images.row_tiles(answer_batch(), 0)
    assert len(tiles) == 1 and (tiles[0] == 200).all()


def test_text_stays_inside_the_image():
    pieces = [batch_images.Piece("W" * n, "plain", 1 + n // 100) for n in range(1, 160)]
    lines = batch_images.wrap(pieces, 300)
    assert len(lines) == batch_images.MAX_LINES
    assert all(x + width <= 300 for line in lines for x, width, _ in line)
    assert "more boxes" in lines[-1][0][2].text
    two = batch_images.wrap([batch_images.Piece("a", "plain", 1), batch_images.Piece("b", "plain", 2)], 300)
    assert [line[0][2].text for line in two] == ["a", "b"]


def test_batch_image_of_each_kind_of_batch(tmp_path):
    batch = answer_batch()
    image = open_image(batch_images.batch_image(batch, decode, tmp_path / "a" / "batch.png"))
    assert image.shape[1] == batch_images.WIDTH and 100 < image.shape[0] < 400
    assert (image == 200).all(axis=-1).sum() == 192 * 192  # the tile, by a whole factor
    marked = np.array([int(batch_images.FILLS["trained"][i : i + 2], 16) for i in (1, 3, 5)])
    assert (image == marked).all(axis=-1).sum() > 500
    text_only = {name: batch[name] for name in ("tokens", "segment_ids", "targets", "loss_weights")}
    open_image(batch_images.batch_image(text_only, decode, tmp_path / "text.png", rows=1))


# ---------------------------------------------------------------------------------------------------------------------
# The page


TIMES = {"training": "0:12:30 (93.1%)"}


def write_page(folder, outside, **more):
    samples = [
        page.Sample(np.full((8, 8, 3), 7, np.uint8), "<script>alert(1)</script>", "Red.", "red"),
        page.Sample(None, "what?", "<b>blue</b>", "red"),
        page.Sample(None, "why?", "because"),
    ]
    inside = folder / "first batch.png"
    for path in (inside, outside):
        Image.new("RGB", (4, 4)).save(path)
    results = {"accuracy": ("91.2%", "95% CI 90 to 92%"), "by kind": {"<i>": 0.5}}
    config = {"note": "</pre><script>"}
    images = [inside, (outside, "<i>Curves", "a <caption>")]
    return page.write_page(folder, "a <run>", config, {"jax": "1"}, results, samples, images, times=TIMES, **more)


def test_page_escapes_all_text_and_needs_no_other_file(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = write_page(folder, tmp_path / "outside.png", about={"command": "a && <b>"}).read_text()
    assert not re.search(r"<(script|b|i|run|caption)>", text)
    assert "&lt;script&gt;alert(1)" in text and "a &lt;run&gt;" in text and "a &amp;&amp; &lt;b&gt;" in text
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(reference.startswith("data:") for reference in references)
    assert "url(" not in text and "http" not in text
    assert len([reference for reference in references if reference.startswith("data:image/png")]) == 3


def test_page_marks_right_and_wrong(tmp_path):
    text = write_page(tmp_path, tmp_path / "other.png").read_text()
    assert "Samples: 1 mistake, and 1 right one<" in text
    assert text.count('class="right"') == text.count('class="wrong"') == 1
    assert "Where the time went" in text and "<td>0:12:30 (93.1%)</td>" in text
    assert "91.2%" in text and "95% CI 90 to 92%" in text and "by kind.&lt;i&gt;" in text
    # Answers come before the batch that the run began with, which is tall.
    assert text.index("Samples: ") < text.index("First batch")


def test_page_links_to_the_chain_only_where_there_is_one(tmp_path):
    text = write_page(tmp_path, tmp_path / "other.png", chain="../report.html").read_text()
    assert '<a href="../report.html">All stages</a>' in text


HEADINGS = {
    (8, 16, 159): "Samples: 8 of 159 mistakes, and 16 right ones",
    (3, 21, 3): "Samples: all 3 mistakes, and 21 right ones",
    (1, 1, 1): "Samples: 1 mistake, and 1 right one",
    (0, 24, 0): "Samples: no mistakes, and 24 right ones",
    (24, 0, 1400): "Samples: 24 of 1,400 mistakes, and no right ones",
    (0, 0, 0): "Samples",
}


@pytest.mark.parametrize("counts", HEADINGS)
def test_the_heading_of_samples_says_what_is_shown_of_what_there_is(counts):
    wrong, right, mistakes = counts
    samples = [page.Sample(None, "?", "no", "yes")] * wrong + [page.Sample(None, "?", "yes", "yes")] * right
    assert page.samples_heading([*samples, page.Sample(None, "?", "anything")], mistakes) == HEADINGS[counts]


def test_page_refuses_an_image_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="lost.png"):
        page.write_page(tmp_path, "a run", {}, {}, {}, [], [tmp_path / "lost.png"])


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def test_versions_name_the_software_and_the_machine():
    found = facts.versions()
    assert {"python", "jax", "flax", "grain", "hovle_jax", "platform", "device", "cpu_count"} <= found.keys()
    assert found["jax"] == __import__("jax").__version__ and found["device_count"] >= 1


def test_the_commit_is_that_of_a_repository_that_has_the_code(tmp_path):
    git = lambda *arguments: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    package = tmp_path / "code"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert facts.git_commit(package) == ""
    git("init")
    assert facts.git_commit(package) == ""  # as an environment inside of somebody's project
    git("add", ".")
    git("commit", "-m", "first")
    assert facts.git_commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True")
    assert facts.git_commit(package) == git("rev-parse", "HEAD") + "-dirty"


def test_facts_are_kept_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-m", "hovle_jax.train", "--workdir", "my runs"])
    facts.write_facts(tmp_path, samples=3)
    found = facts.read_facts(tmp_path)
    assert found["command"] == "python3 -m hovle_jax.train --workdir 'my runs'" and found["samples"] == 3
    assert facts.read_facts(tmp_path / "elsewhere") == {}


def test_peak_memory_is_that_of_the_fullest_device_where_it_is_told():
    device = lambda peak: SimpleNamespace(
        process_index=0, memory_stats=lambda: peak and {"peak_bytes_in_use": peak, "bytes_in_use": 1}
    )
    found = facts.peak_memory([device(5), device(7), device(None)])
    assert found[facts.DEVICE_PEAK] == 7 and found[facts.HOST_PEAK] > 50e6
    assert facts.DEVICE_PEAK not in facts.peak_memory([device(None)])
