"""Exact nearest-neighbour search in a gallery, and the precision of its results.

Two definitions go by the name mAP@10, and both are here: `precision_at_k`, and the paper's own.

Of rows that are equal the earlier is nearer. No order of scores can promise that: a matrix product
gives equal rows values that differ in the last bit, by where they stand. So a search reads the
first of all equal rows, and afterwards gives the others its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.embeddings import MIN_SQUARE, truncate
from keras_mrl_serving.integers import check_positive_integer

from .._arrays import Array, check_features, check_kinds, check_labels_of
from .._dims import blocks

BLOCK_ROWS, _BLOCK_QUERIES = 8192, 512  # the scores of a block of both are one matrix


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
    table = np.asarray(hits)
    if table.ndim != 2 or not table.size or not np.isin(table, (0, 1)).all():
        raise ValueError(
            "hits must be booleans (queries, k) with at least one query. "
            f"Received: {table.dtype} of shape {table.shape}. "
            "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
        )
    return table.astype(bool)


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
    gallery, queries = check_features(gallery, dim), check_features(queries, dim)
    labels = check_labels_of(gallery, gallery_labels)
    expected = check_labels_of(queries, query_labels)
    check_kinds(expected, labels)
    return np.asarray(labels[nearest_ids(gallery, queries, dim, k)] == expected[:, None])


def check_gallery(rows: int, k: Any = 10, name: str = "gallery") -> int:
    """Return the number of neighbours to look for, as Python's own integer.

    Args:
        rows: Rows of the gallery.
        k: Number of neighbours.
        name: Of the gallery, for the error.

    Raises:
        ValueError: If `k` is no positive integer, or the gallery has fewer rows.
    """
    count = check_positive_integer("k", k, "Give for example 10.")
    if rows < count:
        raise ValueError(
            f"A {name} must hold at least the {count} nearest that are looked for. "
            f"Received: {rows} rows. Give more rows."
        )
    return count


def nearest_ids(
    gallery: Any,
    queries: Any,
    dim: int,
    k: int = 10,
    progress: Callable[[], Any] | None = None,
    block_rows: int = BLOCK_ROWS,
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
        block_rows: How many rows of the gallery are read at a time.

    Shapes:
        Returns int64 `(queries, k)`. Of rows that are equal up to `dim`, and of others with equal
        scores, the earlier comes first.

    Raises:
        ValueError: If embeddings are no tables, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_ids
        >>> nearest_ids([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]], dim=2, k=2).tolist()
        [[1, 2]]
    """
    return nearest_by_dim(gallery, queries, (dim,), k, progress, block_rows)[dim]


def nearest_by_dim(
    gallery: Any,
    queries: Any,
    dims: Sequence[int],
    k: int = 10,
    progress: Callable[[], Any] | None = None,
    block_rows: int = BLOCK_ROWS,
    order: Array | None = None,
) -> dict[int, Array]:
    """Return what `nearest_ids` returns, for every dim from one pass over the gallery.

    The products of a prefix are those of the next narrower one plus those of the coordinates
    between, so all dims cost the multiplications of the widest.

    Args:
        gallery: Embeddings `(rows, width)`, at least k.
        queries: Embeddings `(queries, width)`.
        dims: Prefix lengths, ascending.
        k: Number of neighbours.
        progress: Called after every block.
        block_rows: How many rows of the gallery are read at a time.
        order: All positions, in the order in which rows that are equally near come; None means the
            order they stand in.

    Shapes:
        Returns int64 `(queries, k)` for every dim.

    Raises:
        ValueError: If embeddings are no tables, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_by_dim
        >>> gallery = [[2.0, 1.0], [1.0, 0.0], [1.0, 0.1]]
        >>> ids = nearest_by_dim(gallery, [[2.0, 0.0]], dims=(1, 2), k=2)
        >>> ids[1].tolist(), ids[2].tolist()
        ([[0, 1]], [[1, 2]])
    """
    width = dims[-1]
    gallery, queries = check_features(gallery, width), check_features(queries, width)
    k = check_gallery(len(gallery), k)
    if order is not None:
        gallery = _InOrder(gallery, order)
    equals = _equal_rows(gallery, dims)
    copies = {dim: rows[first < rows] for dim, (rows, first) in equals.items()}
    units = truncate(queries, width)
    best = {dim: np.full((len(queries), k), -np.inf, np.float32) for dim in dims}
    ids = {dim: np.zeros((len(queries), k), np.int64) for dim in dims}
    for start in range(0, len(gallery), block_rows):
        block = np.asarray(gallery[start : start + block_rows, :width], np.float32)
        positions = {dim: _without(copies[dim], start, len(block)) for dim in dims}
        inverse = _inverse_lengths(block, dims)
        for query in range(0, len(queries), _BLOCK_QUERIES):
            part = slice(query, query + _BLOCK_QUERIES)
            for dim, product in _products(units[part], block, dims):
                rows = positions[dim]
                scores = product * inverse[dim]
                if len(rows) < len(block):
                    scores = scores[:, rows - start]
                if len(rows):
                    best[dim][part], ids[dim][part] = _merge(
                        best[dim][part], ids[dim][part], scores, rows
                    )
        if progress is not None:
            progress()
    for dim in dims:
        if len(copies[dim]):
            first = np.arange(len(gallery))
            rows, first_of_rows = equals[dim]
            first[rows] = first_of_rows
            ids[dim] = with_copies(first, ids[dim], best[dim])
        else:
            by_score = np.lexsort((ids[dim], -best[dim]))
            ids[dim] = np.take_along_axis(ids[dim], by_score, axis=1)
    return ids if order is None else {dim: order[ids[dim]] for dim in dims}


class _InOrder:
    """The rows of a table in another order, read when they are asked for."""

    def __init__(self, rows: Array, order: Array) -> None:
        self._rows, self._order = rows, order

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[Any, Any]) -> Array:
        rows, columns = key
        return self._rows[self._order[rows], columns]


def _without(copies: Array, start: int, count: int) -> Array:
    """The positions of a block's rows, but for those of `copies` (ascending)."""
    low, high = np.searchsorted(copies, (start, start + count))
    return np.delete(np.arange(start, start + count), copies[low:high] - start)


def _inverse_lengths(block: Array, dims: Sequence[int]) -> dict[int, Array]:
    """One over the length of every prefix: scaling scores is cheaper than a copy of the block."""
    square, inverse = np.zeros(len(block), np.float32), {}
    for first, last in blocks(dims):
        square = square + np.einsum("ij,ij->i", block[:, first:last], block[:, first:last])
        inverse[last] = 1 / np.sqrt(np.maximum(square, MIN_SQUARE))
    return inverse


def _products(queries: Array, block: Array, dims: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """Dim by dim the inner products of prefixes, `(queries, rows)`, in one array that grows."""
    product: Array | None = None
    for first, last in blocks(dims):
        added = queries[:, first:last] @ block[:, first:last].T
        product = added if product is None else np.add(product, added, out=product)
        yield last, product


def _merge(best: Array, ids: Array, scores: Array, positions: Array) -> tuple[Array, Array]:
    """The k best `(queries, k)` of those so far and of a block's `scores` `(queries, rows)`.

    Few rows of a later block beat the worst so far, so they alone are sorted.
    """
    k = best.shape[1]
    worst = best.min(axis=1)
    if np.isneginf(worst).any():  # of the first blocks, when there are no k rows yet
        columns = _largest(scores, min(k, scores.shape[1]))
        queries = np.repeat(np.arange(len(best)), columns.shape[1])
        columns = np.sort(columns, axis=1).ravel()
    else:
        better = np.flatnonzero(scores > worst[:, None])
        queries, columns = np.divmod(better, scores.shape[1])
    count = np.bincount(queries, minlength=len(best))
    most = int(count.max(initial=0))
    if not most:
        return best, ids
    all_scores = np.full((len(best), k + most), -np.inf, np.float32)
    all_ids = np.zeros((len(best), k + most), np.int64)
    all_scores[:, :k], all_ids[:, :k] = best, ids
    place = k + np.arange(len(queries)) - np.repeat(np.cumsum(count) - count, count)
    all_scores[queries, place] = scores[queries, columns]
    all_ids[queries, place] = positions[columns]
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_ids, order, axis=1)


def _largest(scores: Array, count: int) -> Array:
    """Columns of the largest scores of each row, in no order; of equal scores the first columns."""
    last = scores.shape[1] - count
    columns = np.argpartition(scores, last, axis=1)[:, last:]
    least = np.take_along_axis(scores, columns[:, :1], axis=1)
    tied = np.count_nonzero(scores >= least, axis=1) > count
    for row in np.flatnonzero(tied):
        above = np.flatnonzero(scores[row] > least[row])
        level = np.flatnonzero(scores[row] == least[row])
        columns[row] = np.concatenate([above, level[: count - len(above)]])
    return columns


_HASHED_ROWS = 8192  # read together
_SPREAD_QUERIES = 512  # answered together
_GLANCE = 16  # coordinates that tell nearly all rows apart


def first_equal(rows: Array, dim: int) -> Array:
    """Return for every row the position of the first row that equals it in `dim` coordinates.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import first_equal
        >>> first_equal(np.array([[1.0, 5.0], [2.0, 6.0], [1.0, 7.0]]), dim=1).tolist()
        [0, 1, 0]
    """
    first = np.arange(len(rows))
    alike, first_of_alike = _equal_rows(rows, (dim,))[dim]
    first[alike] = first_of_alike
    return first


def _equal_rows(rows: Any, dims: Sequence[int]) -> dict[int, tuple[Array, Array]]:
    """For every dim the positions of the rows that equal another, and of the first that they equal.

    Rows that differ in few coordinates differ in more: at a wider dim only the others are read.
    """
    alike, equals = np.arange(len(rows)), {}
    for width in sorted({min(_GLANCE, dims[0]), *dims}):
        hashes = _hash(rows, alike, width)
        ordered = np.sort(hashes)
        shared = np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])
        hashes, alike = hashes[shared], alike[shared]
        _, index, group = np.unique(hashes, return_index=True, return_inverse=True)
        equals[width] = alike, alike[index[group]]
    return equals


def _hash(rows: Any, positions: Array, width: int) -> Array:
    """64 bits for each row: the same for equal rows, and by one chance in 2^64 for two others."""
    hashes = np.empty(len(positions), np.int64)
    for start in range(0, len(positions), _HASHED_ROWS):
        part = positions[start : start + _HASHED_ROWS]
        # Adding zero makes one of the two zeros that are equal in value and not in bits.
        block = np.asarray(rows[part, :width], np.float32) + np.float32(0)
        data, size = block.tobytes(), block.itemsize * width
        hashes[start : start + _HASHED_ROWS] = [
            hash(data[i : i + size]) for i in range(0, len(data), size)
        ]
    return hashes


def with_copies(first: Array, ids: Array, scores: Array) -> Array:
    """Return the k nearest of all rows, from the k nearest of those that equal no earlier one.

    Args:
        first: What `first_equal` returns, `(rows,)`.
        ids: Positions of rows that equal no earlier one, `(queries, k)`.
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
    parts = [slice(start, start + _SPREAD_QUERIES) for start in range(0, len(ids), _SPREAD_QUERIES)]
    return np.concatenate(
        [_spread(first[members], members, ids[part], scores[part]) for part in parts]
    )


def _spread(leaders: Array, members: Array, ids: Array, scores: Array) -> Array:
    """The k nearest rows where each of `ids` brings the rows that equal it, at most k of them.

    Args:
        leaders: For every row the first that equals it, ascending `(rows,)`.
        members: The rows in that order, so that equal rows stand together, `(rows,)`.
        ids: `(queries, k)`.
        scores: `(queries, k)`.
    """
    queries, k = ids.shape
    begin = np.searchsorted(leaders, ids.ravel())
    count = np.minimum(np.searchsorted(leaders, ids.ravel(), "right") - begin, k)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    copies = members[np.repeat(begin, count) + offset]
    query = np.repeat(np.repeat(np.arange(queries), k), count)
    order = np.lexsort((copies, np.repeat(-scores.ravel(), count), query))
    total = count.reshape(queries, k).sum(axis=1)
    return copies[order[(np.cumsum(total) - total)[:, None] + np.arange(k)]]
