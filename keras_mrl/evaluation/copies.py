"""Equal rows of a gallery: a search reads the first of them, and counts the others by it.

A matrix product gives equal rows values that differ in the last bit, by where they stand. So no
order of its values can promise which of them comes first.
"""

from __future__ import annotations

import numpy as np

from .._features import Array

_ROWS = 8192  # read together
_QUERIES = 512  # answered together
_GLANCE = 16  # coordinates that tell nearly all rows apart


def first_equal(rows: Array, dim: int) -> Array:
    """Return for every row the position of the first that equals it in `dim` coordinates.

    Examples:
        >>> from keras_mrl.evaluation.copies import first_equal
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
    for start in range(0, len(positions), _ROWS):
        part = positions[start : start + _ROWS]
        # Adding zero makes one of the two zeros that are equal in value and not in bits.
        read = np.asarray(rows[part, :width], np.float32) + np.float32(0)
        text, size = read.tobytes(), read.itemsize * width
        keys[start : start + _ROWS] = [hash(text[i : i + size]) for i in range(0, len(text), size)]
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
        >>> from keras_mrl.evaluation.copies import with_copies
        >>> ids, scores = np.array([[2, 0, 1]]), np.array([[0.9, 0.5, 0.1]])
        >>> with_copies(np.array([0, 1, 2, 0, 2]), ids, scores).tolist()
        [[2, 4, 0]]
    """
    members = np.argsort(first, kind="stable")
    parts = [slice(start, start + _QUERIES) for start in range(0, len(ids), _QUERIES)]
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
