"""Makes the pages of the API from the docstrings.

    pip install -e ".[docs]" && python docs/api.py         writes api/index.html
    python docs/api.py FOLDER

The commands are left out: they are run and not imported, and their flags would meet.
"""

import pathlib
import pkgutil
import sys
import warnings

import pdoc

import hovle_jax
from hovle_jax.__main__ import commands


def write(folder: pathlib.Path) -> None:
    """Writes a page for each module of the package into the folder."""
    packages = {module.name for module in pkgutil.iter_modules(hovle_jax.__path__) if module.ispkg}
    names = [f"{name}.__main__" if name in packages else name for name in ("__main__", *commands())]
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():  # pdoc tries those that are left out, too
        warnings.filterwarnings("ignore", message="Couldn't import hovle_jax")
        pdoc.pdoc("hovle_jax", *[f"!hovle_jax.{name}$" for name in names], output_directory=folder)


if __name__ == "__main__":
    write(pathlib.Path(*sys.argv[1:2] or ["api"]))
