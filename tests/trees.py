"""Parameter trees as flat dicts of numpy arrays, and their comparison."""

import numpy as np
from flax.traverse_util import flatten_dict


def host(tree):
    """{path: numpy array}."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def assert_close(first, second, tolerance=1e-5):
    """Two trees; the tolerance is relative to each leaf's largest value, and never under 1e-7."""
    first, second = host(first), host(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        limit = tolerance * max(np.abs(value).max(), 1e-2)
        np.testing.assert_allclose(second[name], value, rtol=0, atol=limit, err_msg=name)
