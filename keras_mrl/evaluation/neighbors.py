"""The nearest rows of a gallery by exact search, and whether they share the query's label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_mrl_serving.embeddings import MIN_SQUARE, truncate

from .._dims import check_count
from .._features import Array, check_features
from .._labels import check_kinds, check_labels_of
from .copies import first_equal, with_copies

_QUERIES, _ROWS = 512, 8192  # at a time: their scores are one matrix


def check_gallery(rows: int, k: Any = 10) -> int:
    """Return the number of neighbours that are looked for, as Python's own integer.

    Raises:
        ValueError: If it is no positive integer, or the gallery has fewer rows.
    """
    count = check_count("k", k, 10)
    if rows < count:
        raise ValueError(
            f"A gallery must hold at least the {count} nearest that are looked for. "
            f"Received: {rows} rows. Give more rows."
        )
    return count


def count_blocks(rows: int) -> int:
    """Return how often a search of a gallery of `rows` calls its `progress`."""
    return -(-rows // _ROWS)


def nearest_ids(
    gallery: Any,
    queries: Any,
    dim: int,
    k: int = 10,
    progress: Callable[[], Any] | None = None,
) -> Array:
    """Return the positions of the k rows nearest by angle, best first.

    The gallery is read a block of rows at a time, and nothing as large as it is made: it may be a
    memory map.

    Args:
        gallery: Embeddings `(rows, width)`, at least k.
        queries: Embeddings `(queries, width)`.
        dim: Both sides are cut to it, then scaled to unit length.
        k: Number of neighbours.
        progress: Called after every block.

    Shapes:
        Returns int64 `(queries, k)`. Of rows that are equal up to `dim` the earlier comes first,
        and of others whose scores come out equal.

    Raises:
        ValueError: If embeddings are no tables, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_ids
        >>> nearest_ids([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]], dim=2, k=2).tolist()
        [[1, 2]]
    """
    rows, asked = check_features(gallery, dim), check_features(queries, dim)
    k = check_gallery(len(rows), k)
    first = first_equal(rows, dim)
    fresh = first == np.arange(len(rows))
    sides = truncate(asked, dim)
    best = np.full((len(asked), k), -np.inf, np.float32)
    ids = np.zeros((len(asked), k), np.int64)
    for start in range(0, len(rows), _ROWS):
        names = start + np.flatnonzero(fresh[start : start + _ROWS])
        block = np.asarray(rows[start : start + _ROWS, :dim], np.float32)
        if len(names) < len(block):
            block = block[names - start]
        # Scaling columns of scores is cheaper than scaling a copy of the block.
        square = np.einsum("ij,ij->i", block, block)
        inverse = 1 / np.sqrt(np.maximum(square, MIN_SQUARE))
        for query in range(0, len(asked) if len(names) else 0, _QUERIES):
            part = slice(query, query + _QUERIES)
            scores = (sides[part] @ block.T) * inverse
            best[part], ids[part] = _better(best[part], ids[part], scores, names)
        if progress is not None:
            progress()
    if not fresh.all():
        return with_copies(first, ids, best)
    return np.take_along_axis(ids, np.lexsort((ids, -best)), axis=1)


def _better(best: Array, ids: Array, scores: Array, names: Array) -> tuple[Array, Array]:
    """The best of those known and of a block's; few of a later block beat the worst known."""
    k = best.shape[1]
    worst = best.min(axis=1)
    if np.isneginf(worst).any():  # the first blocks: the known may be none
        columns = _first_best(scores, min(k, scores.shape[1]))
        rows = np.repeat(np.arange(len(best)), columns.shape[1])
        columns = np.sort(columns, axis=1).ravel()
    else:
        rows, columns = np.nonzero(scores > worst[:, None])
    count = np.bincount(rows, minlength=len(best))
    most = int(count.max(initial=0))
    if not most:
        return best, ids
    wide = np.full((len(best), k + most), -np.inf, np.float32)
    named = np.zeros((len(best), k + most), np.int64)
    wide[:, :k], named[:, :k] = best, ids
    place = k + np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    wide[rows, place] = scores[rows, columns]
    named[rows, place] = names[columns]
    kept = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(wide, kept, axis=1), np.take_along_axis(named, kept, axis=1)


def _first_best(scores: Array, count: int) -> Array:
    """Columns of the best scores of each row, in no order; of equal ones the first."""
    last = scores.shape[1] - count
    columns = np.argpartition(scores, last, axis=1)[:, last:]
    edge = np.take_along_axis(scores, columns[:, :1], axis=1)
    for row in np.flatnonzero(np.count_nonzero(scores >= edge, axis=1) > count):  # a tie across it
        above = np.flatnonzero(scores[row] > edge[row])
        level = np.flatnonzero(scores[row] == edge[row])
        columns[row] = np.concatenate([above, level[: count - len(above)]])
    return columns


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
        ValueError: If embeddings and labels do not fit, the labels of both sides are of different
            kinds, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_hits
        >>> gallery, queries = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]]
        >>> nearest_hits(gallery, [7, 7, 8], queries, [7], dim=2, k=2).tolist()
        [[True, False]]
    """
    rows, asked = check_features(gallery, dim), check_features(queries, dim)
    labels, wanted = check_labels_of(rows, gallery_labels), check_labels_of(asked, query_labels)
    check_kinds(wanted, labels)
    return np.asarray(labels[nearest_ids(rows, asked, dim, k)] == wanted[:, None])
