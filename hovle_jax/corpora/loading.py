"""Loads the corpus that data.source names."""

from collections.abc import Callable

from hovle_jax import corpora
from hovle_jax.config import RunConfig
from hovle_jax.corpora.in_memory import InMemoryCorpus
from hovle_jax.data.rows.indexed import IndexedCorpus

IN_MEMORY = {"easy_vqa": InMemoryCorpus}  # all other sources are indexed: corpora of packages, and paths


def load_corpus(config: RunConfig, split: str, say: Callable[[str], object] = print) -> InMemoryCorpus | IndexedCorpus:
    """The corpus of `data.source`. Raises UserError for a source or split that does not exist."""
    source = config.data.source
    if source in IN_MEMORY:
        return IN_MEMORY[source].load(split)
    return IndexedCorpus.load(source_path(source, split, say), split, say, config.data.outside_root)


def source_path(source: str, split: str, say: Callable[[str], object] = print) -> str:
    """A corpus by package as the folder and split where it is kept, fetched and prepared the first time; others as they
    are."""
    name, _, named_split = source.partition(":")
    return f"{corpora.prepare(name, say)}:{named_split or split}" if name in corpora.CORPORA else source
