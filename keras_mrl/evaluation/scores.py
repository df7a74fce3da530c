"""What the neighbours of embeddings are worth at every dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._dims import check_dims
from .._features import Array, check_features
from .._labels import check_kinds, check_labels_of
from .neighbors import check_gallery, count_blocks, nearest_ids
from .progress import show_progress
from .retrieval import mean_average_precision_at_k, precision_at_k

Quality = dict[int, dict[str, float]]


def score_embeddings(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    dims: Sequence[int],
    k: int = 10,
    verbose: int = 0,
) -> Quality:
    """Return what the neighbours at every dim are worth: see `evaluate`.

    Args:
        queries: Embeddings `(queries, width)`, none of them in the gallery.
        query_labels: `(queries,)`, or `(queries, 1)`.
        gallery: Embeddings `(rows, width)`, at least k.
        gallery_labels: `(rows,)`, or `(rows, 1)`; of the same kind, integers best.
        dims: Prefix lengths; recall is that of the widest.
        k: How many neighbours.
        verbose: 1 shows progress, 0 does not.

    Raises:
        ValueError: If embeddings and labels do not fit, the labels of both sides are of different
            kinds, or the gallery has fewer than k rows.

    Examples:
        >>> gallery = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [0.2, 1.0]]
        >>> scores = score_embeddings([[2.0, 0.0]], [7], gallery, [8, 7, 7, 8], dims=(1, 2), k=2)
        >>> scores[2]
        {'nn1': 1.0, 'knn': 1.0, 'p2': 1.0, 'map2': 1.0, 'recall2': 1.0}
    """
    ladder = check_dims(dims)
    asked, rows = check_features(queries, ladder[-1]), check_features(gallery, ladder[-1])
    wanted, labels = check_labels_of(asked, query_labels), check_labels_of(rows, gallery_labels)
    check_kinds(wanted, labels)
    k = check_gallery(len(rows), k)
    progress = show_progress(len(ladder) * count_blocks(len(rows)), "block", verbose)
    exact = nearest_ids(rows, asked, ladder[-1], k, progress)
    scores: Quality = {}
    for dim in ladder:
        ids = exact if dim == ladder[-1] else nearest_ids(rows, asked, dim, k, progress)
        named = labels[ids]
        hits = named == wanted[:, None]
        found = [len(np.intersect1d(a, b)) for a, b in zip(ids, exact, strict=True)]
        scores[dim] = {
            "nn1": float(hits[:, 0].mean()),
            "knn": float((_vote(named) == wanted).mean()),
            f"p{k}": precision_at_k(hits),
            f"map{k}": mean_average_precision_at_k(hits),
            f"recall{k}": float(np.mean(found) / k),
        }
    return scores


def _vote(named: Array) -> Array:
    """The most frequent label of each row; of equally frequent ones the smallest."""
    ordered = np.sort(named, axis=1)
    places = np.arange(ordered.shape[1])
    starts = np.ones(ordered.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)  # equal ones before
    return np.take_along_axis(ordered, run.argmax(axis=1)[:, None], axis=1)[:, 0]
