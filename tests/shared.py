"""Reference outputs: the project's own in tests/golden, and those that lie beside the repository (else skipped)."""

import json
import os
import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"
OWN = pathlib.Path(__file__).parent / "golden"  # made by tests/reference
ROOT = pathlib.Path(os.environ.get("HOVLE_GOLDEN") or SHARED / "golden")


def golden(name):
    """The folder of a golden file set: the project's own, or one beside the repository (skips the test without it)."""
    for root in (OWN, ROOT):
        if (root / name).is_dir():
            return root / name
    pytest.skip(f"no golden folder {ROOT / name}; set HOVLE_GOLDEN to where the golden folders lie")


def folders(prefix):
    """Names of the golden folders that start with `prefix`, for parametrisation; the absence of others is one skip."""
    own, found = (sorted(path.name for path in root.glob(f"{prefix}*") if path.is_dir()) for root in (OWN, ROOT))
    reason = f"no golden folders {ROOT}/{prefix}*; set HOVLE_GOLDEN to where they lie"
    return own + (found or [pytest.param(prefix, marks=pytest.mark.skip(reason=reason))])


def checkpoint_keys(name):
    """{tensor name: shape} of a public checkpoint; skips the test when the list is absent."""
    path = SHARED / "checkpoint_keys" / f"{name}_keys.json"
    if not path.is_file():
        pytest.skip(f"no key list {path}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
