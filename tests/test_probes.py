"""Linear probes: against references in float64, what a sweep chooses, K images of a class, the command."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.labelled import open_labelled
from hovle_jax.evaluation.probes import features as of_images
from hovle_jax.evaluation.probes import fitting, logistic, ridge, shots
from hovle_jax.evaluation.probes.features import features_of
from hovle_jax.inference.encoder import Encoder
from tests import micro
from tests.test_commands import command

pytestmark = pytest.mark.usefixtures("quick_compilation")


def data(images, width, classes, seed=0, scales=1.0, apart=1.0):
    """Overlapping classes of unequal sizes, away from the origin."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, images) * rng.integers(0, 2, images)).astype(np.int32)
    labels[:classes] = np.arange(classes)
    centres = apart * rng.normal(size=(classes, width))
    return ((centres[labels] + rng.normal(size=(images, width)) + 3) * scales).astype(np.float32), labels


def logistic_reference(x, labels, classes, penalty):
    """Newton's method on all of sum -log p + penalty / 2 |W|², the Hessian written out; of two classes one vector."""
    x = np.concatenate([x.astype(float), np.ones((len(x), 1))], 1)
    columns = 1 if classes == 2 else classes
    weights, decay = np.zeros((x.shape[1], columns)), np.full((x.shape[1], columns), penalty)
    decay[-1] = 0
    for _ in range(60):
        logits = x @ weights
        logits = np.concatenate([0 * logits, logits], 1) if classes == 2 else logits
        likely = np.exp(logits - logits.max(1, keepdims=True))
        likely /= likely.sum(1, keepdims=True)
        errors = (likely - np.eye(classes)[labels])[:, -columns:]
        gradient = (x.T @ errors + decay * weights).ravel()
        shown = likely[:, -columns:]
        blocks = np.eye(columns) * shown[:, :, None] - shown[:, :, None] * shown[:, None, :]
        hessian = np.einsum("ni,nab,nj->iajb", x, blocks, x).reshape(len(gradient), -1) + np.diag(decay.ravel())
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-13)[0]
        weights -= step.reshape(weights.shape)
    return x @ (np.concatenate([0 * weights, weights], 1) if classes == 2 else weights)


CASES = {
    "many images": dict(images=120, width=5, classes=4),
    "two classes": dict(images=90, width=4, classes=2),
    "fewer images than features": dict(images=12, width=20, classes=3),
    "badly scaled": dict(images=150, width=6, classes=3, scales=10.0 ** np.arange(-3, 3)),
}


def differences_of(logits):
    """Between classes, as adding a number to all of an image's logits changes nothing."""
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("name", CASES)
def test_logistic_regression_is_the_minimum(name):
    case = CASES[name]
    x, labels = data(**case)
    penalties = [1.0, 0.1] if name != "badly scaled" else [1.0, 0.3]
    used = np.ones(len(x), bool)
    fits = logistic.path(x, labels, case["classes"], penalties, used, tolerance=1e-9)
    for penalty, linear in zip(penalties, fits, strict=True):
        expected = differences_of(logistic_reference(x, labels, case["classes"], penalty))
        found = differences_of(linear.logits(x))
        assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max() + 2e-3, penalty


def test_images_that_are_held_out_change_nothing():
    x, labels = data(100, 5, 3)
    used = np.arange(100) % 3 > 0
    (own,) = logistic.path(x[used], labels[used], 3, [0.5], np.ones(used.sum(), bool), 1e-9)
    (masked,) = logistic.path(x, labels, 3, [0.5], used, 1e-9)
    np.testing.assert_allclose(masked.weights, own.weights, atol=2e-3)
    np.testing.assert_allclose(masked.bias, own.bias, atol=2e-3)
    (first,), (second,) = ridge.path(x, labels, 3, [2.0], used), ridge.path(x[used], labels[used], 3, [2.0], used[used])
    np.testing.assert_array_equal(first.weights, second.weights)


def test_a_fit_that_is_not_at_its_end_is_said(monkeypatch, capsys):
    x, labels = data(60, 5, 3)
    real = logistic.fit
    monkeypatch.setattr(logistic, "fit", functools.partial(real, most_steps=1))
    list(logistic.path(x, labels, 3, [0.0123], np.ones(60, bool)))
    assert "logistic regression with C=81 is" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("several", [False, True], ids=["Cholesky", "eigenvectors"])
def test_ridge_solves_the_normal_equations(name, several):
    case = CASES[name]
    x, labels = data(**case)
    penalties = [5.0, 0.5] if several else [0.5]
    *_, linear = ridge.path(x, labels, case["classes"], penalties, np.ones(len(x), bool))
    extended = np.concatenate([x.astype(float), np.ones((len(x), 1))], 1)
    decay = np.diag([0.5] * x.shape[1] + [0])
    targets = 2 * np.eye(case["classes"])[labels] - 1
    expected = extended @ np.linalg.solve(extended.T @ extended + decay, extended.T @ targets)
    np.testing.assert_allclose(linear.logits(x), expected, atol=3e-3)


@pytest.mark.parametrize("kind", fitting.KINDS)
def test_the_penalty_is_the_best_on_held_out_images(kind):
    x, labels = data(300, 40, 3, apart=0.35)
    probe = fitting.fit_best(kind, x, labels, 3)
    assert len(probe.tried) == len(fitting.STRENGTHS) and probe.tried[probe.penalty] == max(probe.tried.values())
    assert sorted(probe.tried, reverse=True) == list(probe.tried)
    alone = fitting.fit(kind, x, labels, 3, probe.penalty)
    np.testing.assert_allclose(alone.linear.weights, probe.linear.weights, atol=1e-5)
    name, value = {"logistic": ("C", 1 / probe.penalty), "ridge": ("alpha", probe.penalty)}[kind]
    assert probe.settings()[name] == pytest.approx(value, rel=1e-3)


def test_the_held_out_part_has_some_of_each_class():
    labels = np.repeat(np.arange(3), [50, 5, 1])
    chosen = fitting.part_of_each_class(labels, 0.2)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [10, 1, 0]
    assert np.array_equal(chosen, fitting.part_of_each_class(labels, 0.2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:-1], y), "do not go together"),
        (lambda x, y: (np.where(np.arange(len(x))[:, None] == 2, np.nan, x), y), "1 of 20 rows .* not finite"),
        (lambda x, y: (x, 0 * y), r"the labels \[0\]"),
        (lambda x, y: (x, y + 1), "the labels"),
        (lambda x, y: (x[:3], y[:3]), "3 images are too few to hold a fifth"),
    ],
)
def test_what_can_have_no_probe(change, message):
    with pytest.raises(UserError, match=message):
        fitting.fit_best("ridge", *change(*data(20, 4, 3)), 3)


def test_shots_are_drawn_of_each_class_and_held_by_larger_draws():
    labels = np.repeat(np.arange(3), [9, 6, 4])
    order = shots._order(labels, seed=1)
    for count in (1, 2, 4, 8):
        assert np.bincount(labels[order < count], minlength=3).tolist() == [min(count, n) for n in (9, 6, 4)]
    assert not np.array_equal(order, shots._order(labels, seed=2))


@pytest.mark.parametrize("kind", fitting.KINDS)
def test_more_shots_are_better(kind):
    train, test = data(400, 8, 3, seed=3, apart=1.2), data(400, 8, 3, seed=3, apart=1.2)
    found = shots.few_shot(kind, train, test, 3, [1, 16, 500], 4)
    assert [one.shots for one in found] == [1, 16, 500] and found[0].mean + 0.05 < found[1].mean
    assert len(set(found[0].accuracies)) > 1 and found[0].deviation == pytest.approx(
        np.std(found[0].accuracies, ddof=1)
    )
    fewest = int(np.bincount(train[1]).min())
    assert found[2].deviation == 0 and found[2].strength == 1 and found[2].row()["smallest class"] == fewest
    again = shots.few_shot(kind, train, test, 3, [1], 4)
    assert again[0] == found[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return micro.finished_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders train and test of three shapes, in noise; one picture cannot be read."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for shape in ("circle", "rectangle", "triangle"):
            (root / part / shape).mkdir(parents=True)
            for i in range(count):
                noisy = np.clip(micro.draw("red", shape) + rng.integers(-40, 40, (32, 32, 3)), 0, 255)
                Image.fromarray(noisy.astype(np.uint8)).save(root / part / shape / f"{i}.png")
    (root / "train" / "circle" / "broken.png").write_bytes(b"no image")
    return root


def test_features_are_encoded_once(clip, pictures, monkeypatch):
    encoder, labelled = Encoder.load(clip, batch_size=4), open_labelled(pictures / "train")
    made = features_of(encoder, clip, labelled)
    assert made.pooled.shape == (24, 32) and made.vectors.shape == (24, 16) and made.names[0] == "circle"
    assert [event.reason for event in made.bad] == ["not_an_image"] and np.bincount(made.labels).tolist() == [8, 8, 8]
    files = sorted(path for path in (pictures / "train").rglob("*.png") if path.stem != "broken")
    images = [np.asarray(Image.open(path)) for path in files]
    np.testing.assert_allclose(made.pooled, encoder.images(images, "pooled"), atol=1e-4)
    np.testing.assert_allclose(made.vectors, encoder.images(images), atol=1e-4)
    monkeypatch.setattr(of_images, "_encoded", None)
    again = features_of(encoder, clip, open_labelled(pictures / "train"))
    assert np.array_equal(again.pooled, made.pooled) and again.bad == made.bad


def test_the_command(clip, pictures, tmp_path):
    asked = ["--checkpoint", clip, "--data", pictures / "train", "--test", pictures / "test", "--out", tmp_path / "out"]
    result = command("probe", *asked, "--shots", "1,4", "--seeds", "2", "--kind", "ridge", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["images"] == 24 and found["test_images"] == 12 and found["bad_images"] == 1
    assert found["accuracy"] > 60 and [row["shots"] for row in found["shots"]] == [1, 4]
    assert found == json.loads((tmp_path / "out" / "probe.json").read_text())
    assert Image.open(tmp_path / "out" / "probe.png").size[0] > 400
    assert "broken.png" in (tmp_path / "out" / "bad_images.jsonl").read_text()


MISTAKES = {
    "the same images": (dict(test="train"), "--data and --test are both"),
    "no kind": (dict(kind="svm"), "--kind=svm is not known; use one of logistic, ridge"),
    "no numbers": (dict(shots="1,x"), "--shots=1,x: give numbers"),
    "twice": (dict(shots="2,2"), "--shots=2,2: give different numbers"),
    "no seeds": (dict(seeds="0"), "--seeds=0 must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    changed, message = MISTAKES[name]
    given = dict(checkpoint=tmp_path / "absent", data="train", test="test") | changed
    result = command("probe", *[f"--{key}={value}" for key, value in given.items()])
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
