"""The nearest rows of a gallery by exact search, and whether they share the query's label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl_serving.embeddings import MIN_SQUARE, truncate

from .._arrays import Array, check_features, check_kinds, check_labels_of
from .._dims import check_count

# What the slow parts of an evaluation show of how far they are.


def show_progress(steps: int, unit: str, verbose: int) -> Callable[[], None]:
    """Return what is called after every step, and draws a bar of them where `verbose` is not 0.

    The bar is there before the first step: that may take minutes.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import show_progress
        >>> show_progress(3, "probe", verbose=0)()
    """
    if not verbose:
        return lambda: None
    bar = keras.utils.Progbar(steps, unit_name=unit)
    bar.update(0)
    return lambda: bar.add(1)


# Equal rows of a gallery: a search reads the first of them, and counts the others by it.
#
# A matrix product gives equal rows values that differ in the last bit, by where they stand. So no
# order of its values can promise which of them comes first.

_COPY_ROWS = 8192  # read together
_COPY_QUERIES = 512  # answered together
_GLANCE = 16  # coordinates that tell nearly all rows apart


def first_equal(rows: Array, dim: int) -> Array:
    """Return for every row the position of the first that equals it in `dim` coordinates.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import first_equal
        >>> first_equal(np.array([[1.0, 5.0], [2.0, 6.0], [1.0, 7.0]]), dim=1).tolist()
        [0, 1, 0]
    """
    first = np.arange(len(rows))
    alike = first
    for width in sorted({min(_GLANCE, dim), dim}):
        keys = _keys(rows, alike, width)
        ordered = np.sort(keys)
        shared = np.isin(keys, ordered[1:][ordered[1:] == ordered[:-1]])
        keys, alike = keys[shared], alike[shared]
    _, index, group = np.unique(keys, return_index=True, return_inverse=True)
    first[alike] = alike[index[group]]
    return first


def _keys(rows: Array, positions: Array, width: int) -> Array:
    """64 bits for each row: the same for equal ones, and by one chance in 2^64 for two others."""
    keys = np.empty(len(positions), np.int64)
    for start in range(0, len(positions), _COPY_ROWS):
        part = positions[start : start + _COPY_ROWS]
        # Adding zero makes one of the two zeros that are equal in value and not in bits.
        read = np.asarray(rows[part, :width], np.float32) + np.float32(0)
        text, size = read.tobytes(), read.itemsize * width
        keys[start : start + _COPY_ROWS] = [
            hash(text[i : i + size]) for i in range(0, len(text), size)
        ]
    return keys


def with_copies(first: Array, ids: Array, scores: Array) -> Array:
    """Return the k nearest of all rows, from the k nearest of those that are first of their kind.

    Args:
        first: What `first_equal` returns, `(rows,)`.
        ids: Positions of rows that no earlier one equals, `(queries, k)`.
        scores: Of those rows, `(queries, k)`; minus infinity where there are no k of them.

    Shapes:
        Returns int64 `(queries, k)`, best first, of equal scores the earlier row.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import with_copies
        >>> ids, scores = np.array([[2, 0, 1]]), np.array([[0.9, 0.5, 0.1]])
        >>> with_copies(np.array([0, 1, 2, 0, 2]), ids, scores).tolist()
        [[2, 4, 0]]
    """
    members = np.argsort(first, kind="stable")
    parts = [slice(start, start + _COPY_QUERIES) for start in range(0, len(ids), _COPY_QUERIES)]
    found = [_spread(first[members], members, ids[part], scores[part]) for part in parts]
    return np.concatenate(found)


def _spread(leaders: Array, members: Array, ids: Array, scores: Array) -> Array:
    """The best of at most k copies of every row; `members` stand together by their `leaders`."""
    queries, k = ids.shape
    begin = np.searchsorted(leaders, ids.ravel())
    count = np.minimum(np.searchsorted(leaders, ids.ravel(), "right") - begin, k)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    copies = members[np.repeat(begin, count) + offset]
    query = np.repeat(np.repeat(np.arange(queries), k), count)
    order = np.lexsort((copies, np.repeat(-scores.ravel(), count), query))
    total = count.reshape(queries, k).sum(axis=1)
    return copies[order[(np.cumsum(total) - total)[:, None] + np.arange(k)]]


# How many of the nearest rows share the query's label, and how early.
#
# Two definitions go by the name mAP@10 and both are here: `precision_at_k` and the paper's own.


def precision_at_k(hits: npt.ArrayLike) -> float:
    """Return the mean share of the k nearest whose label matches (p10 at k = 10).

    Args:
        hits: Whether each of the k nearest, best first, has the query's label.

    Shapes:
        hits: `(queries, k)`.

    Raises:
        ValueError: If `hits` is not two-dimensional or holds no query.

    Examples:
        >>> precision_at_k([[True, False], [True, True]])
        0.75
    """
    return float(_check_hits(hits).mean())


def mean_average_precision_at_k(hits: npt.ArrayLike) -> float:
    """Return the mean average precision as the paper's code counts it (map10 at k = 10).

    Args:
        hits: Whether each of the k nearest, best first, has the query's label. The query itself
            must not be in the gallery.

    Shapes:
        hits: `(queries, k)`.

    Formula:
        AP = 1/k * sum over hits at rank i <= k of precision@i; divided by k, not by the hits

    Raises:
        ValueError: If `hits` is not two-dimensional or holds no query.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3 and its public code.

    Examples:
        >>> mean_average_precision_at_k([[True, False, True]])  # (1/1 + 2/3) / 3
        0.5555555555555555
    """
    checked = _check_hits(hits)
    ranks = np.arange(1, checked.shape[1] + 1)
    precision = np.cumsum(checked, axis=1) / ranks
    return float((precision * checked).sum(axis=1).mean() / len(ranks))


def _check_hits(hits: npt.ArrayLike) -> npt.NDArray[np.bool]:
    checked = np.asarray(hits)
    if checked.ndim != 2 or not checked.size or not np.isin(checked, (0, 1)).all():
        raise ValueError(
            "hits must be booleans (queries, k) with at least one query. "
            f"Received: {checked.dtype} of shape {checked.shape}. "
            "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
        )
    return checked.astype(bool)


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
