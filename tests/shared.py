"""Reference outputs: the project's own in tests/golden, and those that lie beside the repository (else skipped)."""

import json
import os
import pathlib
import re

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


def golden_roots(name):
    """The folders of a golden file set wherever they lie, for parametrisation; one that is absent is a skip."""
    found = [pytest.param(OWN / name, id="own")] if (OWN / name).is_dir() else []
    absent = pytest.mark.skipif(not (ROOT / name).is_dir(), reason=f"no golden folder {ROOT / name}; set HOVLE_GOLDEN")
    return [*found, pytest.param(ROOT / name, id="beside", marks=absent)]


def public_checkpoint(name):
    """What golden/public_checkpoints.json says of a public checkpoint, with `shapes` as {tensor name: shape}.

    '{24}' in a name stands for the numbers of 24 layers. Where a name has another checkpoint's in place of a shape,
    the tensors are that one's that begin with the name, or all of them with the name in front.
    """
    listed = json.loads((OWN / "public_checkpoints.json").read_text())[name]
    return listed | {"shapes": {name: shape for item in listed["shapes"].items() for name, shape in _expanded(*item)}}


def _expanded(pattern, shape):
    if isinstance(shape, str):
        other = public_checkpoint(shape)["shapes"]
        inside = {name: x for name, x in other.items() if name.startswith(pattern)}
        return (inside or {pattern + name: x for name, x in other.items()}).items()
    layers = re.search(r"{(\d+)}", pattern)
    count = int(layers[1]) if layers else 1
    return [(re.sub(r"{\d+}", str(i), pattern), tuple(shape)) for i in range(count)]


def checkpoint_keys(name):
    """{tensor name: shape} of a public checkpoint as listed beside the repository; skips the test without the list."""
    path = SHARED / "checkpoint_keys" / f"{name}_keys.json"
    if not path.is_file():
        pytest.skip(f"no key list {path}")
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
