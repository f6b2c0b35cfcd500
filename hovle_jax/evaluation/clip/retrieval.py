"""Retrieval: the rank of the right text for each image, and of the right image for each text.

Letters: I images, T texts, E width of the common space.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip.pairs import Pairs
from hovle_jax.evaluation.clip.zero_shot_report import Task, write_bad
from hovle_jax.inference.encoder import BATCH, Encoder
from hovle_jax.retrieval.nearest import ranks
from hovle_jax.system.batching import batched
from hovle_jax.system.files import write_json
from hovle_jax.system.progress import track

AT = (1, 5, 10)  # R@K: the share of queries with a right answer among the first K
EQUAL = 1e-6  # scores no further apart are equal, and wrong answers of equal scores come first
DIRECTIONS = ("image to text", "text to image")
COLUMNS = ("checkpoint", "images", "texts", *(f"{way} R@{k}" for way in DIRECTIONS for k in AT))


def evaluate_retrieval(
    checkpoints: list[str], task: Task, batch_size: int = BATCH, dtype: str = "", say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Scores each model on the same pairs -> its scores, which are in retrieval.json of its folder too.

    Args:
      task: its data are rows with an image and one caption or several; of folders below RUN/retrieval_DATA.
    Raises:
      UserError: no such model or data, or no row is a pair.
    """
    results = []
    for checkpoint, folder in zip(checkpoints, task.folders(checkpoints, "retrieval")):
        encoder = Encoder.load(checkpoint, batch_size, dtype)
        pairs = Pairs.open(task.data, task.limit, task.outside_root, say)
        made = {"checkpoint": checkpoint, "data": task.data} | score(encoder, pairs, say)
        folder.mkdir(parents=True, exist_ok=True)
        write_bad(pairs.bad, pathlib.Path(folder))
        write_json(folder / "retrieval.json", made)
        results.append(made | {"folder": str(folder)})
    return results


def score(encoder: Encoder, pairs: Pairs, say: Callable[[str], None]) -> dict[str, Any]:
    """{name: number} of a model: percents, and median ranks. Raises UserError where no row is a pair."""
    rows = track(pairs.images(), say, "images", "rows", len(pairs))
    images = [encoder.images(part) for part in batched((x for x in rows if x is not None), encoder.rows)]
    if not images:
        first = f"; the first: {pairs.bad[0].sample}: {pairs.bad[0].detail}" if pairs.bad else ""
        raise UserError(f"none of {len(pairs):,} rows is an image with a caption{first}")
    say(f"{len(pairs.texts):,} texts")
    vectors, owners = (np.concatenate(images), encoder.texts(list(pairs.texts))), pairs.owners()
    found: dict[str, Any] = {"images": len(vectors[0]), "texts": len(vectors[1])}
    found |= measures(*vectors, *owners)
    return found | ({"bad rows": len(pairs.bad)} if pairs.bad else {})


def measures(images: np.ndarray, texts: np.ndarray, owners: np.ndarray, text_owners: np.ndarray) -> dict[str, float]:
    """R@K in percent and the median rank, both ways.

    Args:
      images, texts: [I, E] and [T, E] float32 unit vectors.
      owners, text_owners: [I] and [T] int32; a text is right for an image where both are equal. Each has a right one.
    """
    best = best_right(images, texts, owners, text_owners)
    sides = ((images, texts, owners, text_owners), (texts, images, text_owners, owners))
    found = {}
    for way, side, most in zip(DIRECTIONS, sides, best):
        places = ranks(*side, most - np.float32(EQUAL))
        found |= {f"{way} R@{k}": round(100 * float(np.mean(places <= k)), 2) for k in AT}
        found[f"{way} median rank"] = float(np.median(places))
    return found


def best_right(images: np.ndarray, texts: np.ndarray, owners: np.ndarray, text_owners: np.ndarray) -> Any:
    """-> ([I], [T]): the largest product of each with a right one."""
    best = np.full(len(images), -np.inf, np.float32), np.full(len(texts), -np.inf, np.float32)
    mine, theirs = (np.argsort(each, kind="stable") for each in (owners, text_owners))
    groups = np.unique(owners)
    for a, b in zip(_members(owners, mine, groups), _members(text_owners, theirs, groups)):
        products = images[a] @ texts[b].T
        best[0][a], best[1][b] = products.max(1), products.max(0)
    return best


def _members(owners, order, groups):
    """The indices of each group."""
    starts, ends = (np.searchsorted(owners[order], groups, side) for side in ("left", "right"))
    return (order[start:end] for start, end in zip(starts, ends))
