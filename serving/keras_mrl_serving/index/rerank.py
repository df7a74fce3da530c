"""Compares queries with the rows on their shortlists, in FAISS: no Python per row."""

from __future__ import annotations

import numpy as np

from .arrays import Ids, Vectors
from .shortlister import import_faiss


def closest(
    queries: Vectors, rows: Vectors, shortlists: Ids | None, keep: int, metric: str
) -> tuple[Ids, Vectors]:
    """Return the best rows of each query's shortlist, best first, and their scores.

    Args:
        queries: As the metric compares them, contiguous `(batch, dim)`.
        rows: All rows of the gallery, likewise `(rows, dim)`; only those on a shortlist are read.
        shortlists: Row numbers `(batch, n)`, contiguous, -1 after the last; None: every row.
        keep: How many of them are wanted.
        metric: "cosine", "dot" or "l2".

    Shapes:
        Returns int64 and float32 `(batch, keep)`, fewer columns where there are fewer rows, and
        -1 where a shortlist is shorter.

    Examples:
        >>> rows = np.float32([[1, 0], [0, 1], [1, 1]])
        >>> closest(rows[:1], rows, np.array([[1, 2]]), 1, "dot")[0].tolist()
        [[2]]
    """
    faiss = import_faiss()
    is_distance = metric == "l2"
    if shortlists is None:
        kind = faiss.METRIC_L2 if is_distance else faiss.METRIC_INNER_PRODUCT
        scores, best = faiss.knn(queries, rows, min(keep, len(rows)), metric=kind)
    else:
        stride = shortlists.shape[1]
        keep = min(keep, stride)
        scores = np.empty((len(queries), keep), np.float32)
        best = np.empty((len(queries), keep), np.int64)
        by_idx = faiss.knn_L2sqr_by_idx if is_distance else faiss.knn_inner_products_by_idx
        x, y, subset, values, ids = map(faiss.swig_ptr, (queries, rows, shortlists, scores, best))
        sizes = queries.shape[1], len(queries), len(rows), stride, keep
        by_idx(x, y, subset, *sizes, values, ids, stride)  # FAISS's own stride is len(rows)
    return best, -scores if is_distance else scores
