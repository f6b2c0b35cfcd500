"""Reference outputs and key lists that lie beside the repository; a test that needs an absent one is skipped."""

import json
import os
import pathlib

import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"
ROOT = pathlib.Path(os.environ.get("HOVLE_GOLDEN") or SHARED / "golden")


def golden(name):
    """The folder of a golden file set; skips the test when it is absent."""
    folder = ROOT / name
    if not folder.is_dir():
        pytest.skip(f"no golden folder {folder}; set HOVLE_GOLDEN to where the golden folders lie")
    return folder


def folders(prefix):
    """Names of the golden folders that start with `prefix`, for parametrisation; their absence is one skipped test."""
    found = sorted(path.name for path in ROOT.glob(f"{prefix}*") if path.is_dir())
    reason = f"no golden folders {ROOT}/{prefix}*; set HOVLE_GOLDEN to where they lie"
    return found or [pytest.param(prefix, marks=pytest.mark.skip(reason=reason))]


def checkpoint_keys(name):
    """{tensor name: shape} of a public checkpoint; skips the test when the list is absent."""
    path = SHARED / "checkpoint_keys" / f"{name}_keys.json"
    if not path.is_file():
        pytest.skip(f"no key list {path}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}


class Expected:
    """The arrays of a golden folder's expected.npz: each is read as an input or compared, else `finish` fails.

    Attributes:
      errors: {key: max abs error} of what was compared.
    """

    def __init__(self, folder):
        self.arrays = dict(np.load(folder / "expected.npz"))
        self.used = set()
        self.errors = {}

    def __contains__(self, key):
        return key in self.arrays

    def input(self, key):
        self.used.add(key)
        return self.arrays[key]

    def compare(self, key, ours, where=True):
        """Notes the largest difference; `where` (broadcast from the left) leaves out what is not defined."""
        self.used.add(key)
        reference, ours = self.arrays[key], np.asarray(ours)
        assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, expected {reference.shape}"
        difference = np.abs(ours.astype(np.float64) - reference)
        if where is not True:
            difference = difference[np.asarray(where, bool)]
        self.errors[key] = float(np.max(difference))  # NaN stays NaN and fails below

    def compare_gradients(self, gradients, aliases=None):
        """Compares public gradients {name: array} with all `grad.<name>` and with keys that `aliases` translates."""
        for key in self.arrays:
            name = (aliases or {}).get(key, key.removeprefix("grad.") if key.startswith("grad.") else None)
            if name is not None:
                self.compare(key, gradients[name])

    def finish(self, tolerance):
        print(f"\nlargest error {max(self.errors.values()):.1e} ({max(self.errors, key=self.errors.get)})")
        too_large = {key: error for key, error in self.errors.items() if not error <= tolerance}
        assert not too_large, f"max abs error over {tolerance}: {too_large}"
        assert self.used == set(self.arrays), f"never looked at: {sorted(set(self.arrays) - self.used)}"
