"""Zero-shot classification: class vectors, probabilities, the likelihood of answers, measures, bad input."""

import json
import os
import pathlib
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import class_vectors as vectors
from hovle_jax.evaluation.clip.classifiers import Asked, best, probabilities, rank_of
from hovle_jax.evaluation.clip.image_files import classify_files, find_images, find_labels
from hovle_jax.evaluation.clip.labelled import open_labelled
from hovle_jax.evaluation.clip.measures import Calibration, Choices
from hovle_jax.evaluation.clip.templates import SETS, check_templates, find_templates, prompts
from hovle_jax.evaluation.clip.zero_shot import classify
from hovle_jax.evaluation.clip.zero_shot_report import Task, evaluate_zero_shot
from hovle_jax.inference.encoder import Encoder
from hovle_jax.report.classification import short
from tests import micro
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation", "own_cache")
NAMES = ("circle", "rectangle", "a long name of a triangle")
SEVEN = SETS["seven"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return micro.finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def encoder(clip):
    return Encoder.load(clip, batch_size=8)


def pictures(count):
    return [example.image for example in micro.examples()[:count]]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and class vectors


def test_every_set_has_places_and_nothing_twice():
    for name, templates in SETS.items():
        check_templates(templates, name)
        assert len(set(templates)) == len(templates)
    assert len(SETS["simple"]) == 1 and len(SEVEN) == 7 and find_templates("") == SETS["simple"]
    assert prompts("{x} {}", ("a {}.", "{} and {}")) == ["a {x} {}.", "{x} {} and {x} {}"]


def test_a_file_of_templates_is_read(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\ufeffa bad photo of a {}.\n\nart of {c}.\n", "utf-8")
    assert find_templates(str(path)) == ("a bad photo of a {}.", "art of {}.")
    path.write_text("a photo\n")
    with pytest.raises(UserError, match="'a photo' has no {} for the name"):
        find_templates(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="has no templates"):
        find_templates(str(path))
    with pytest.raises(UserError, match="sevn: there is no such set, and no file; did you mean seven"):
        find_templates("sevn")


def test_a_class_is_the_normalised_mean_of_normalised_texts(encoder, clip):
    made = vectors.class_vectors(encoder, clip, NAMES, SEVEN)
    module = encoder.loaded.models["clip"].bind({"params": encoder.loaded.params["clip"]})
    for row, name in zip(made, NAMES):
        texts = np.stack([encoder.text_row(template.replace("{}", name)) for template in SEVEN])
        expected = unit(unit(np.asarray(module.text_states(texts)[2], np.float64)).mean(axis=0))
        np.testing.assert_allclose(row, expected, atol=1e-5)
    many = [f"class {i}" for i in range(9)]
    whole = vectors.made_vectors(encoder, many, SEVEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "TEXTS_AT_ONCE", 15)  # two classes at a time
        np.testing.assert_allclose(vectors.made_vectors(encoder, many, SEVEN), whole, atol=1e-6)


def test_class_vectors_are_made_once_for_each_model_and_prompt(encoder, clip, monkeypatch):
    made, real = [], vectors.made_vectors
    monkeypatch.setattr(vectors, "made_vectors", lambda *of: made.append(of[1]) or real(*of))
    ask = lambda names=("a cat", "a dog"), templates=SETS["simple"]: vectors.class_vectors(
        encoder, clip, names, templates
    )
    first = ask()
    np.testing.assert_array_equal(ask(), first)
    assert len(made) == 1
    ask(("a dog", "a cat"))
    ask(templates=SEVEN)
    assert len(made) == 3
    monkeypatch.setattr(vectors, "tokenizer_digest", lambda folder: "another")
    ask()
    assert len(made) == 4
    monkeypatch.setattr(vectors, "component_digest", lambda folder, component: "another")
    ask()
    assert len(made) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_class_vectors_are_made_again(encoder, clip, damage):
    names = ("one", f"two {damage}")
    first, cache = vectors.class_vectors(encoder, clip, names, SEVEN), pathlib.Path(os.environ["HOVLE_CACHE"])
    path = max(cache.glob("class_vectors/*/vectors.npy"), key=lambda path: path.stat().st_mtime_ns)
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 64]) + content[-2:]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b""}[damage])
    np.testing.assert_array_equal(vectors.class_vectors(encoder, clip, names, SEVEN), first)
    assert path.read_bytes() == content


def test_of_two_that_want_the_same_one_makes_it(encoder, clip, monkeypatch):
    """The lock is of the file system: threads open it anew, as processes do."""
    made, real = [], vectors.made_vectors
    monkeypatch.setattr(vectors, "made_vectors", lambda *of: made.append(1) or real(*of))
    found = []
    ask = lambda: found.append(vectors.class_vectors(encoder, clip, ("this", "that"), SEVEN))
    both = [threading.Thread(target=ask) for _ in range(2)]
    [one.start() for one in both]
    [one.join() for one in both]
    assert len(made) == 1 and np.array_equal(*found)


def test_a_digest_is_of_what_vectors_depend_on(tmp_path):
    folder = micro.finished_clip(tmp_path)
    before = vectors.component_digest(folder, "clip"), vectors.tokenizer_digest(folder)
    (tmp_path / "notes.txt").write_text("x")
    assert before == (vectors.component_digest(folder, "clip"), vectors.tokenizer_digest(folder))
    (tmp_path / "model" / "files.json").unlink()  # an older folder: of the files themselves
    listed = vectors.component_digest(folder, "clip")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    assert vectors.component_digest(folder, "clip") != listed
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert vectors.tokenizer_digest(folder) != before[1]


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


def test_softmax_of_scaled_cosines(encoder, clip):
    classifier = Asked("seven", batch_size=8).open(clip, NAMES)
    made = classifier.probabilities(pictures(5))
    logits = encoder.scale * encoder.images(pictures(5)) @ vectors.class_vectors(encoder, clip, NAMES, SEVEN).T
    powers = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(made, powers / powers.sum(axis=1, keepdims=True), atol=1e-5)
    assert classifier.kind == "softmax" and classifier.flops() > 1e5


def test_sigmoids_of_a_model_that_was_trained_so(tmp_path):
    folder = micro.finished_clip(tmp_path, loss="sigmoid")
    classifier = Asked(batch_size=8).open(folder, NAMES)
    encoder = classifier.encoder
    made = classifier.probabilities(pictures(3))
    cosines = encoder.images(pictures(3)) @ classifier.vectors.T
    np.testing.assert_allclose(made, 1 / (1 + np.exp(-(encoder.scale * cosines + encoder.bias))), rtol=1e-4)
    assert classifier.kind == "sigmoid" and encoder.bias != 0
    far = probabilities(encoder, np.full((1, 1), 1e4, np.float32), np.asarray([[1.0], [-1.0]], np.float32))
    np.testing.assert_allclose(far, [[1, 0]], atol=1e-6)


def test_hovle_scores_answers_by_the_mean_likelihood_of_their_tokens(run):
    """Against each pair of image and class by itself, without padding, from all logits."""
    classifier = Asked(prompt="what shape is it?", batch_size=4).open(run, NAMES)
    made = classifier.scores(pictures(5))
    answerer = classifier.loaded.answerer
    from hovle_jax.inference.generate import prompt_batch

    logits_of = jax.jit(answerer.hovle.logits)
    for row, picture in zip(made[:2], pictures(2)):
        for score, name in zip(row, NAMES):
            sample = answerer.processor.sample((("what shape is it?", name),), (picture,))
            logits = np.asarray(logits_of(answerer.params, prompt_batch(answerer, [sample])), np.float64)[0]
            scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            at = np.flatnonzero(sample.supervised)
            assert answerer.tokenizer.decode(sample.tokens[at]).strip() == name and len(at) > 1
            np.testing.assert_allclose(score, np.mean([scores[i - 1, sample.tokens[i]] for i in at]), atol=1e-4)
    powers = np.exp(made)
    np.testing.assert_allclose(
        classifier.probabilities(pictures(5)), powers / powers.sum(axis=1, keepdims=True), atol=1e-5
    )
    assert classifier.kind == "likelihood" and classifier.flops() > 1e6
    for batch_size in (2, 64):  # fewer classes at once than there are, and all of several images
        other = Asked(prompt="what shape is it?", batch_size=batch_size).open(run, NAMES)
        np.testing.assert_allclose(other.scores(pictures(5)), made, atol=1e-4)


def test_a_class_costs_its_own_tokens_alone(run):
    """Not the image's and the question's again."""
    few = Asked(prompt="what shape is it?").open(run, NAMES)
    many = Asked(prompt="what shape is it?").open(run, [f"{name} {i}" for name in NAMES for i in range(4)])
    for classifier in (few, many):
        classifier.scores(pictures(1))
    more = (many.flops() - few.flops()) / (len(many.names) - len(few.names))
    question = few.flops() - len(NAMES) * more
    assert 0 < more < question


def test_equal_scores_go_to_the_earlier_class():
    scores = np.asarray([1.0, 3.0, 3.0, 2.0])
    assert best(scores, 3).tolist() == [1, 2, 3]
    assert [rank_of(scores, label) for label in range(4)] == [3, 0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def test_measures_against_loops():
    rng = np.random.default_rng(0)
    count, classes = 400, 12
    scores = rng.random((count, classes)).round(2)  # some equal
    labels = rng.integers(0, classes - 1, count)  # the last class has no image
    order = [best(row, classes).tolist() for row in scores]
    ranks = np.asarray([row.index(label) for row, label in zip(order, labels)])
    confidences = scores.max(axis=1)
    choices = Choices(labels, np.asarray([row[0] for row in order]), ranks, confidences)
    right = np.asarray([row[0] == label for row, label in zip(order, labels)])
    assert choices.top(1) == right.mean()
    assert choices.top(5) == np.mean([label in row[:5] for row, label in zip(order, labels)])
    each = choices.per_class(classes)
    np.testing.assert_allclose(each[:-1], [right[labels == c].mean() for c in range(classes - 1)])
    assert np.isnan(each[-1])
    table = choices.confusion(classes)
    assert all(table[a, b] == np.sum((labels == a) & (choices.chosen == b)) for a, b in np.ndindex(*table.shape))
    wrong = table - np.diag(np.diag(table))
    assert [n for *_, n in choices.confused(5)] == sorted(wrong.ravel().tolist(), reverse=True)[:5]
    error = 0.0
    for low in range(15):
        inside = (confidences > low / 15) & (confidences <= (low + 1) / 15) | ((confidences == 0) & (low == 0))
        if inside.any():
            error += inside.sum() / count * abs(right[inside].mean() - confidences[inside].mean())
    assert choices.calibration().error == pytest.approx(error)
    found = choices.scores(classes)
    assert found["top-1"] == round(100 * right.mean(), 2) and found["top-1 95% interval"][0] < found["top-1"]
    assert found["mean of classes"] == round(100 * np.mean(each[:-1]), 2) and "top-5" in found
    assert "top-5" not in Choices(labels % 3, labels % 3, ranks, confidences).scores(3)


def test_calibration_of_the_sure_and_of_the_right():
    assert Calibration.of(np.ones(4), np.ones(4)).error == 0
    assert Calibration.of(np.ones(4), np.asarray([1, 1, 0, 0])).error == pytest.approx(0.5)
    assert Calibration.of(np.asarray([0.0, 1e-9]), np.zeros(2)).counts.tolist() == [2, *[0] * 14]


def test_classified_images_are_those_of_one_by_one(clip, tmp_path):
    """With a broken one among them, over several batches."""
    for i, picture in enumerate(pictures(11)):
        (tmp_path / f"{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"{i % 3}" / f"{i:02}.png")
    (tmp_path / "1" / "04.png").write_bytes(b"no image")
    labelled, names = open_labelled(tmp_path), ("circle", "rectangle", "triangle")
    classifier = Asked(batch_size=4).open(clip, names)
    outcome = classify(classifier, names, labelled.items, len(labelled))
    assert len(outcome.predictions) == 10 and [event.reason for event in outcome.bad] == ["not_an_image"]
    for one in outcome.predictions:
        (row,) = classifier.probabilities([np.asarray(Image.open(one.where[0]))])
        assert one.best[0][0] == row.argmax() and one.best[0][1] == pytest.approx(row.max(), abs=1e-5)
        assert one.rank == np.sum(row > row[one.label]) and one.label == int(pathlib.Path(one.where[0]).parent.name)
    assert outcome.scores()["bad images"] == {"not_an_image": 1}
    with pytest.raises(UserError, match="no image can be read .not_an_image 1.*04.png"):
        classify(classifier, names, [item for item in labelled.items if "04" in item.where[0]], 1)


# ---------------------------------------------------------------------------------------------------------------------
# What a user gives


def test_labels_and_images_that_are_named(tmp_path, clip):
    (tmp_path / "labels.txt").write_text("cat\n\nbig dog\n")
    assert find_labels(str(tmp_path / "labels.txt")) == find_labels("cat, big dog,") == ("cat", "big dog")
    for i in range(3):
        Image.fromarray(pictures(3)[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert find_images([str(tmp_path)]) == find_images([str(tmp_path / "*.png"), paths[1]]) == paths
    assert find_images([paths[1], paths[0]]) == paths[1::-1]
    found = list(classify_files(Asked(batch_size=8).open(clip, NAMES), paths, kept=1))
    assert [one.path for one in found] == paths and found[2].problem and not found[0].problem
    assert found[0].image is not None and found[1].image is None
    names = [name for name, _ in found[0].top(NAMES, 2)]
    assert names[0] == NAMES[int(np.argmax(found[0].probabilities))] and len(names) == 2


@pytest.mark.parametrize("given, message", [
    ("cat,dog,Cat", "--labels names the class 'cat' twice"),
    ("cat", "leaves nothing to choose"),
    (",", "leaves nothing to choose"),
])  # fmt: skip
def test_labels_that_are_none(given, message):
    with pytest.raises(UserError, match=message):
        find_labels(given)


def test_images_and_models_that_are_none(tmp_path, clip, run):
    with pytest.raises(UserError, match=r"\*.jpg: no such file"):
        find_images([f"{tmp_path}/*.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder has no images"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="there is no folder"):
        Asked().check(tmp_path / "absent")
    alone = micro.finished_clip(tmp_path / "alone")
    (alone / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        Asked().open(alone, NAMES)
    (alone / "model" / "clip").rename(alone / "model" / "teacher")
    with pytest.raises(UserError, match="neither the towers of a CLIP nor an embedding with an LLM"):
        Asked().check(alone)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def image_folder(folder):
    for i, example in enumerate(micro.examples()[:9]):
        place = folder / example.caption.split()[2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example.image).save(place / f"{i}.png")
    return folder


def test_classify_by_the_command(clip, tmp_path):
    data = image_folder(tmp_path / "set")
    (data / "circle" / "0.png").write_bytes(b"broken")
    arguments = ["--checkpoint", clip, "--labels", "circle,rectangle,triangle", "--images", f"{data}/*/*.png"]
    made = command("classify", *arguments, "--picture", tmp_path / "out.png", "--top", 2, "--templates", "seven")
    assert made.returncode == 1 and "1 of 9 images cannot be read" in made.stderr and "0.png cannot be" in made.stderr
    lines = made.stdout.splitlines()
    assert sum(line.endswith(".png") for line in lines) == 8 and sum("%" in line for line in lines) == 16
    assert lines[-1].startswith("probabilities: a softmax") and Image.open(tmp_path / "out.png").size[0] > 500
    said = command("classify", *arguments[:4], "--json", "--images", data / "triangle", data / "rectangle")
    found = json.loads(said.stdout)
    assert said.returncode == 0 and found["labels"] == ["circle", "rectangle", "triangle"]
    assert len(found["images"]) == 6 and found["probabilities"] == "softmax"
    assert all(sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-4) for one in found["images"])


def test_teacher_and_student_in_one_table(clip, run, tmp_path):
    data = image_folder(tmp_path / "set")
    (data / "circle" / "0.png").write_bytes(b"broken")
    arguments = ["zeroshot", "--data", data, "--out", tmp_path / "out", "--checkpoint"]
    made = command("evaluate", *arguments, f"{clip},{run}")
    lines = made.stdout.splitlines()
    assert made.returncode == 0 and len(lines) == 3 and lines[0].split()[:3] == ["checkpoint", "images", "classes"]
    assert str(clip) in lines[1] and "softmax" in lines[1] and str(run) in lines[2] and "likelihood" in lines[2]
    for folder in (tmp_path / "out").iterdir():
        names = {path.name for path in folder.iterdir()}
        assert names == {"bad_images.jsonl", "confusion.png", "predictions.jsonl", "reliability.png", "scores.json"}
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        scores = json.loads((folder / "scores.json").read_text())
        assert len(rows) == scores["images"] == 8 and scores["bad images"] == {"not_an_image": 1}
        assert scores["top-1"] == round(100 * np.mean([row["right"] for row in rows]), 2)
        assert set(scores["per class"]) == {"circle", "rectangle", "triangle"}
    alone = json.loads(command("evaluate", *arguments, clip, "--json").stdout)
    assert [one["probabilities"] for one in alone["results"]] == ["softmax"]


def test_many_classes_are_drawn_as_their_mistakes(clip, tmp_path):
    data = image_folder(tmp_path / "set")
    for i in range(45):
        (data / f"class {i}").mkdir()
        Image.fromarray(pictures(1)[0]).save(data / f"class {i}" / "a.png")
    task = Task(str(data), out=str(tmp_path / "out"))
    (scores,) = evaluate_zero_shot([str(clip)], task, Asked(batch_size=16), lambda line: None)
    assert (
        scores["classes"] == 48 and "top-5" in scores and Image.open(tmp_path / "out" / "confusion.png").size[0] > 900
    )
    with pytest.raises(UserError, match="names a model twice"):
        evaluate_zero_shot([str(clip)] * 2, task, Asked())


@pytest.mark.parametrize("name, shown", [
    ("flag_New_Caledonia_fluent.png", "flag_New_Caledonia_fluent..."), ("a  short one", "a short one"), ("1$", r"1\$"),
])  # fmt: skip
def test_a_name_is_cut_where_it_does_not_fit(name, shown):
    assert short(name, 28) == shown
