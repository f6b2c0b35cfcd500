"""The one folder outside of a run's own that the project writes to."""

import os
import pathlib


def cache_dir(*parts):
    """`HOVLE_CACHE`, by default hovle_jax under the user's cache, and a folder in it; made when missing."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hovle_jax"
    path = pathlib.Path(os.environ.get("HOVLE_CACHE") or default).joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
