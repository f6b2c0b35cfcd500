"""Linear probes against scikit-learn on 20,000 x 512 features of 100 classes: seconds and accuracy.

    python -m venv peer && peer/bin/pip install scikit-learn
    python tests/benchmarks/probes.py --peer peer/bin/python

Features are normal around the means of their classes with a spectrum that falls as a power, as those of image towers
do, and once more with columns scaled by 0.01 to 100. Rounds take turns; the first, which compiles, does not count.
scikit-learn's logistic regression runs at its own tolerance, with as many steps as that takes.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
from peer import found

from hovle_jax.evaluation.probes import fitting

IMAGES, TEST, WIDTH, CLASSES = 20_000, 5_000, 512, 100
SPECTRUM, APART, SCALES = -0.5, 0.4, 2  # exponents; and how far the means are apart, in standard deviations
PENALTIES = {"logistic": 1.0, "ridge": 100.0}
SETUP = """
import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifier

def run(path, kind, penalty):
    data = np.load(path)
    model = RidgeClassifier(alpha=penalty) if kind == "ridge" else LogisticRegression(C=1 / penalty, max_iter=2000)
    start = time.perf_counter()
    model.fit(data["x"], data["y"])
    seconds = time.perf_counter() - start
    return [seconds, model.score(data["test_x"], data["test_y"]), int(np.max(getattr(model, "n_iter_", 0) or 0))]
"""


def features(badly_scaled, seed=0):
    """{x, y, test_x, test_y}."""
    rng = np.random.default_rng(seed)
    spectrum = (1.0 + np.arange(WIDTH)) ** SPECTRUM
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    means = APART * rng.normal(size=(CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, IMAGES + TEST).astype(np.int32)
    noise = rng.normal(size=(len(labels), WIDTH)) * (1 + rng.exponential(size=(len(labels), 1)))
    made = ((means[labels] + noise) * spectrum) @ turn + 0.3 * rng.normal(size=WIDTH)
    if badly_scaled:
        made *= 10 ** rng.uniform(-SCALES, SCALES, WIDTH)
    made = made.astype(np.float32)
    return {"x": made[:IMAGES], "y": labels[:IMAGES], "test_x": made[IMAGES:], "test_y": labels[IMAGES:]}


def ours(data, kind, penalty):
    """-> (seconds of the fit, accuracy)."""
    start = time.perf_counter()
    probe = fitting.fit(kind, data["x"], data["y"], CLASSES, penalty)
    return time.perf_counter() - start, probe.linear.accuracy(data["test_x"], data["test_y"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default="", help="a Python that has scikit-learn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="ridge,logistic")
    options = parser.parse_args()
    peer = found(options.peer, SETUP, "scikit-learn")
    with tempfile.TemporaryDirectory() as folder:
        for name, bad in {"plain": False, "badly scaled": True}.items():
            data, path = features(bad), str(pathlib.Path(folder) / "features.npz")
            np.savez(path, **data)
            for kind in options.kinds.split(","):
                compare(f"{kind}, {name}", data, path, kind, peer, options.rounds)
    if peer:
        peer.close()


def compare(name, data, path, kind, peer, rounds):
    """Prints a line."""
    penalty = PENALTIES[kind]
    ours(data, kind, penalty)
    own, theirs = [], []
    for _ in range(rounds):
        own.append(ours(data, kind, penalty))
        if peer:
            theirs.append(peer(path, kind, penalty)[1])
    seconds, accuracy = statistics.median(s for s, _ in own), own[0][1]
    line = f"{name}: ours {seconds:.2f} s, accuracy {100 * accuracy:.2f}"
    if theirs:
        median = statistics.median(each[0] for each in theirs)
        line += f"; scikit-learn {median:.2f} s, accuracy {100 * theirs[0][1]:.2f}, {theirs[0][2]} steps"
        line += f"; {median / seconds:.1f} times as fast, {100 * abs(accuracy - theirs[0][1]):.2f} points apart"
    print(line, flush=True)


if __name__ == "__main__":
    main()
