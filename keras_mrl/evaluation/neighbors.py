"""The nearest rows of a gallery by exact search, and whether they share the query's label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_mrl_serving.embeddings import MIN_SQUARE, truncate

from .._features import Array, check_features, check_labels_of

_QUERIES, _ROWS = 512, 8192  # at a time: their scores are one matrix


def check_gallery(rows: int, k: int = 10) -> None:
    """Raise a `ValueError` where a gallery has fewer rows than neighbours are looked for."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive integer. Received: k={k!r}. Give for example 10.")
    if rows < k:
        raise ValueError(
            f"A gallery must hold at least the {k} nearest that are looked for. "
            f"Received: {rows} rows. Give more rows."
        )


def nearest_ids(
    gallery: Any,
    queries: Any,
    dim: int,
    k: int = 10,
    progress: Callable[[], Any] | None = None,
) -> Array:
    """Return the positions of the k rows nearest by angle, best first.

    The gallery is read once, a block of rows at a time, and nothing as large as it is made: it may
    be a memory map.

    Args:
        gallery: Embeddings `(rows, width)`, at least k.
        queries: Embeddings `(queries, width)`.
        dim: Both sides are cut to it, then scaled to unit length.
        k: Number of neighbours.
        progress: Called after every block.

    Shapes:
        Returns int64 `(queries, k)`. Of rows as near the earlier one counts.

    Raises:
        ValueError: If embeddings are no tables, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_ids
        >>> nearest_ids([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]], dim=2, k=2).tolist()
        [[1, 2]]
    """
    rows, asked = check_features(gallery, dim), check_features(queries, dim)
    check_gallery(len(rows), k)
    sides = truncate(asked, dim)
    best = np.full((len(asked), k), -np.inf, np.float32)
    ids = np.zeros((len(asked), k), np.int64)
    for start in range(0, len(rows), _ROWS):
        block = np.asarray(rows[start : start + _ROWS, :dim], np.float32)
        # Scaling columns of scores is cheaper than scaling a copy of the block.
        square = np.einsum("ij,ij->i", block, block)
        inverse = 1 / np.sqrt(np.maximum(square, MIN_SQUARE))
        for first in range(0, len(asked), _QUERIES):
            part = slice(first, first + _QUERIES)
            scores = (sides[part] @ block.T) * inverse
            best[part], ids[part] = _better(best[part], ids[part], scores, start)
        if progress is not None:
            progress()
    order = np.lexsort((ids, -best))
    return np.take_along_axis(ids, order, axis=1)


def _better(best: Array, ids: Array, scores: Array, start: int) -> tuple[Array, Array]:
    """The best of those known and of a block's; few of a later block beat the worst known."""
    k = best.shape[1]
    worst = best.min(axis=1)
    if np.isneginf(worst).any():  # the first blocks: the known may be none
        short = min(k, scores.shape[1])
        columns = np.argpartition(scores, scores.shape[1] - short, axis=1)[:, -short:]
        rows = np.repeat(np.arange(len(best)), short)
        columns = np.sort(columns, axis=1).ravel()
    else:
        rows, columns = np.nonzero(scores > worst[:, None])
    count = np.bincount(rows, minlength=len(best))
    most = int(count.max(initial=0))
    if not most:
        return best, ids
    wide = np.full((len(best), k + most), -np.inf, np.float32)
    names = np.zeros((len(best), k + most), np.int64)
    wide[:, :k], names[:, :k] = best, ids
    place = k + np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    wide[rows, place] = scores[rows, columns]
    names[rows, place] = columns + start
    kept = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(wide, kept, axis=1), np.take_along_axis(names, kept, axis=1)


def nearest_hits(
    gallery: Any, gallery_labels: Any, queries: Any, query_labels: Any, dim: int, k: int = 10
) -> Array:
    """Return whether each of the k nearest by angle, best first, has the query's label.

    Args:
        gallery: Embeddings `(rows, width)`, at least k.
        gallery_labels: `(rows,)`.
        queries: Embeddings `(queries, width)`, none of them in the gallery.
        query_labels: `(queries,)`.
        dim: Both sides are cut to it, then scaled to unit length.
        k: Number of neighbours.

    Shapes:
        Returns booleans `(queries, k)`.

    Raises:
        ValueError: If embeddings and labels do not fit, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_hits
        >>> gallery, queries = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]]
        >>> nearest_hits(gallery, [7, 7, 8], queries, [7], dim=2, k=2).tolist()
        [[True, False]]
    """
    rows, asked = check_features(gallery, dim), check_features(queries, dim)
    labels, wanted = check_labels_of(rows, gallery_labels), check_labels_of(asked, query_labels)
    return np.asarray(labels[nearest_ids(rows, asked, dim, k)] == wanted[:, None])
