"""Shift: corruptions that are the same each time, what convolves and displaces, robustness, the reports of it."""

import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.classifiers import Asked
from hovle_jax.evaluation.clip.labelled import open_labelled
from hovle_jax.evaluation.clip.zero_shot_report import Task
from hovle_jax.evaluation.shift import pixels
from hovle_jax.evaluation.shift.corruptions import CORRUPTIONS, STRENGTHS, corrupt, find_corruptions, reduced
from hovle_jax.evaluation.shift.report import evaluate_shift
from hovle_jax.evaluation.shift.robustness import Line, effective_robustness, read_baseline, summary
from hovle_jax.evaluation.shift.variants import among, corrupted, on_data_sets
from tests import micro

pytestmark = pytest.mark.usefixtures("quick_compilation", "own_cache")
CLASSES = ("circle", "rectangle", "triangle")


def photo(height=60, width=80):
    """Smooth colours with an edge and some texture, as photos have them."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([120 + 80 * np.sin(x / 9), 90 + y, 140 + 40 * np.cos((x + y) / 5)], axis=2)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (230, 40, 60)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def quiet(line):
    pass


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


def image_folder(folder, classes=CLASSES):
    for i, example in enumerate(micro.examples()):
        name = example.caption.split()[2]
        if name in classes:
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(example.image).save(folder / name / f"{i:02}.png")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions


def test_fifteen_of_four_kinds_at_five_strengths():
    kinds = [corruption.kind for corruption in CORRUPTIONS.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"noise": 3, "blur": 4, "weather": 4, "digital": 4}
    assert all(len(corruption.amounts) == len(STRENGTHS) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_the_same_each_time_and_grows(name):
    image = photo()
    clean = np.asarray(image, float)
    made = [np.asarray(corrupt(image, name, strength, index=3, seed=1), float) for strength in STRENGTHS]
    for strength, one in zip(STRENGTHS, made):
        assert one.shape == clean.shape
        np.testing.assert_array_equal(np.asarray(corrupt(image, name, strength, index=3, seed=1), float), one)
    errors = [np.sqrt(np.mean((one - clean) ** 2)) for one in made]
    assert errors[0] > 0.5 and errors[-1] > 1.3 * errors[0], errors
    ordered = sorted(errors) == errors
    assert ordered or name in ("fog", "elastic", "frost", "glass_blur", "motion_blur", "pixelate", "snow"), errors
    drawn = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg")
    for other in ({"index": 4, "seed": 1}, {"index": 3, "seed": 2}):
        again = np.asarray(corrupt(image, name, 5, **other), float)
        assert np.array_equal(again, made[-1]) != drawn


def test_corruptions_of_the_smallest_and_of_large_images():
    for name in CORRUPTIONS:
        assert corrupt(np.full((1, 1, 3), 9, np.uint8), name, 5).size == (1, 1)
        assert corrupt(np.zeros((3, 2, 3), np.uint8), name, 1).size == (2, 3)
    assert reduced(Image.new("RGB", (1000, 500))).size == (512, 256)
    assert reduced(Image.new("RGB", (100, 50))).size == (100, 50)
    assert corrupt(Image.new("L", (600, 300)), "contrast", 1).size == (512, 256)


def test_corruptions_by_name_and_kind():
    assert find_corruptions("") == () and find_corruptions("all") == tuple(CORRUPTIONS)
    assert find_corruptions("fog,noise,fog") == ("fog", "gaussian_noise", "shot_noise", "impulse_noise")
    with pytest.raises(UserError, match="there is no 'rain'; use all, noise, blur"):
        find_corruptions("rain")


def test_convolution_against_a_loop():
    rng = np.random.default_rng(0)
    x = rng.random((9, 7, 2)).astype(np.float32)
    for kernel in (pixels.disk(1.4), pixels.gaussian(0.8), pixels.line(5, 0.6)):
        assert kernel.sum() == pytest.approx(1, abs=1e-6) and kernel.shape[0] % 2 == 1
        reach = kernel.shape[0] // 2
        padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "symmetric")
        expected = np.zeros_like(x)
        for i, j in np.ndindex(9, 7):
            window = padded[i : i + 2 * reach + 1, j : j + 2 * reach + 1]
            expected[i, j] = np.einsum("ij,ijc->c", kernel[::-1, ::-1], window)
        np.testing.assert_allclose(pixels.convolved(x, kernel), expected, atol=1e-5)
    assert pixels.disk(0.0).sum() == pixels.gaussian(0.0).sum() == pixels.line(0.0, 1.0).sum() == 1


def test_pixels_come_from_where_the_field_points():
    x = np.arange(20, dtype=np.float32).reshape(4, 5, 1)
    still, right = np.zeros((2, 4, 5)), np.stack([np.zeros((4, 5)), np.full((4, 5), 0.5)])
    np.testing.assert_array_equal(pixels.displaced(x, still), x)
    np.testing.assert_allclose(pixels.displaced(x, right)[:, :4], x[:, :4] + 0.5)
    np.testing.assert_array_equal(pixels.displaced(x, right)[:, 4], x[:, 4])  # beyond the edge lies the edge
    noise = pixels.fractal(np.random.default_rng(0), 30, 50, 0.5)
    assert noise.shape == (30, 50) and noise.min() == 0 and noise.max() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# Robustness


def test_effective_robustness_is_what_lies_above_the_line():
    logit = lambda p: np.log(p / (1 - p))
    clean = np.asarray([0.5, 0.6, 0.7, 0.8])
    shifted = 1 / (1 + np.exp(-(0.9 * logit(clean) - 1)))
    line = Line.through(clean, shifted)
    assert (line.slope, line.offset) == (pytest.approx(0.9), pytest.approx(-1))
    assert effective_robustness(line, 0.75, line.predicted(0.75) + 0.1) == pytest.approx(10)
    assert effective_robustness(line, 0.6, shifted[1]) == pytest.approx(0, abs=1e-9)
    assert 0 < line.predicted(0.0) < line.predicted(1.0) < 1


def test_a_baseline_is_read_from_a_csv(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,clean,mean,fog 5\na,60,40,20\nb,70,52,\nc,80,66,45\nd,90,81,70\n")
    lines = read_baseline(path)
    assert set(lines) == {"mean", "fog 5"} and lines["mean"].predicted(0.7) == pytest.approx(0.52, abs=0.02)
    for text, message in {
        "model,mean\na,1\n": "has no column 'clean'",
        "": "has no column 'clean'",
        "clean,mean\n60,40\n70,50\n": "a line needs 3 models",
        "clean,mean\n60,40\n60,50\n60,70\n": "a line needs 3 models",
        "clean,mean\n60,40\nx,50\n": "line 3 has clean='x'",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_baseline(path)
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_baseline(tmp_path / "absent.csv")


def test_a_summary_of_variants():
    found = summary({"a": 0.8, "b": 0.5}, {"a": 0.6, "b": 0.25})
    assert found == {"mean": 42.5, "mean drop": 22.5, "kept": 62.5, "worst": 25.0}


# ---------------------------------------------------------------------------------------------------------------------
# Models under shift


def test_accuracies_under_corruption_are_those_of_each_image(clip, tmp_path):
    labelled = open_labelled(image_folder(tmp_path)).first(10)
    classifier = Asked(batch_size=4).open(clip, CLASSES)
    found = corrupted(classifier, labelled, ("fog", "jpeg"), 7, quiet)
    assert set(found.shifted) == {f"{name} {s}" for name in ("fog", "jpeg") for s in STRENGTHS}
    for name, strength in (("fog", 1), ("fog", 5), ("jpeg", 3)):
        right = 0
        for index, item in enumerate(labelled.items):
            (row,) = classifier.probabilities([corrupt(item.image, name, strength, index, 7)])
            right += int(row.argmax() == item.label)
        assert found.shifted[f"{name} {strength}"] == right / 10
    (clean,) = set(found.clean.values())
    assert clean == found.accuracy and found.images["clean"] == found.images["fog 1"] == 10
    assert found.seconds_per_image > 0 and found.flops == classifier.flops()


def test_a_set_of_fewer_classes_is_compared_with_the_images_of_these(clip, tmp_path):
    base = open_labelled(image_folder(tmp_path / "base"))
    fewer = open_labelled(image_folder(tmp_path / "fewer", ("circle", "triangle")))
    found = on_data_sets(str(clip), Asked(batch_size=8), [base, fewer], quiet)
    assert found.clean["fewer"] == found.shifted["fewer"]  # they are the same images
    assert found.images == {"clean": 24, "fewer": 16}
    part = among(base, ("triangle", "circle"))
    assert part.labels.tolist() == [1] * 8 + [0] * 8 and part.names == ("triangle", "circle")
    assert all(part.names[item.label] in item.where[0] for item in part.items)
    with pytest.raises(UserError, match="has the class 'rectangle', and 1 in all, which .*fewer lacks"):
        on_data_sets(str(clip), Asked(batch_size=8), [fewer, base], quiet)


def test_the_report_has_scores_and_figures(clip, tmp_path):
    data, baseline = image_folder(tmp_path / "set"), tmp_path / "models.csv"
    (data / "circle" / "zz.png").write_bytes(b"")
    baseline.write_text("clean,mean,fog 2\n20,10,5\n40,25,15\n60,45,30\n")
    other = micro.finished_clip(tmp_path / "other", loss="sigmoid")
    task = Task(str(data), limit=13, out=str(tmp_path / "out"))
    results = evaluate_shift([str(clip), str(other)], task, Asked(batch_size=8), "fog", str(baseline), 0, quiet)
    first, second = results
    assert "relative robustness" not in first and second["relative robustness"] == pytest.approx(
        second["mean"] - first["mean"], abs=0.011
    )
    assert {"clean", "mean drop", "kept", "effective robustness", "FLOPs per image"} <= first.keys()
    for result in results:
        folder = tmp_path / "out" / result["folder"].rpartition("/")[2]
        stored = json.loads((folder / "shift.json").read_text())
        assert [row["variant"] for row in stored["variants"]] == [f"fog {s}" for s in STRENGTHS]
        assert "effective robustness" in stored["variants"][1] and stored["clean"] == result["clean"]
        for name in ("shift.png", "corruptions.png"):
            assert Image.open(folder / name).size[0] > 300
    assert (tmp_path / "out" / "costs.png").is_file()


@pytest.mark.parametrize("data, corruptions, message", [
    ("a,b", "all", "--corruptions change one data set, and --data names 2"),
    ("a", "", "--data names one data set: name two or more"),
    ("a,a", "", "names a data set twice"),
    ("a,b", "", "no file at a"),
])  # fmt: skip
def test_data_that_is_none(clip, data, corruptions, message):
    with pytest.raises(UserError, match=message):
        evaluate_shift([str(clip)], Task(data), Asked(), corruptions, say=quiet)
