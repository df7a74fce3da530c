"""Are the neighbours that a graph finds those of its gallery? Every search, on a few queries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving.embeddings import MIN_SQUARE
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.results import Neighbors

from .difference import differs, equal_rows
from .mapped import forget
from .tolerance import TOLERANCE

QUERIES = 16  # asked; a graph holds a score for each of them and each row of the gallery
_ROWS_AT_ONCE = 4096  # held in float64

Array = npt.NDArray[Any]
Ask = Callable[[str, Mapping[str, Array]], dict[str, Array]]


def check_searches(
    ask: Ask, index: ExactIndex, queries: Array, names: Collection[str]
) -> dict[str, float]:
    """Compare `search` with the funnel of `index`, and `search_<m>` with all its rows at m.

    Args:
        ask: Runs a signature.
        index: The gallery.
        queries: `(rows, width)`, of which the first few are asked.
        names: The signatures there are; those that are no search are left alone.

    Returns:
        By signature, the largest difference of the scores, as `same_neighbors` returns it.

    Raises:
        ExportError: If one finds others.
    """
    queries = queries[:QUERIES]
    shares = {}
    if contract.SEARCH in names:
        found = ask(contract.SEARCH, {"embedding": queries})
        expected = index.search(queries)
        shares[contract.SEARCH] = same_neighbors(
            contract.SEARCH, found, expected, queries, index.metric
        )
    dims = [dim for dim in range(1, index.width + 1) if contract.search(dim) in names]
    for dim, expected in exact_neighbors(index, queries, dims).items():
        prefix = np.ascontiguousarray(queries[:, :dim])
        found = ask(contract.search(dim), {"embedding": prefix})
        shares[contract.search(dim)] = same_neighbors(
            contract.search(dim), found, expected, prefix, index.metric
        )
    return shares


def same_neighbors(
    signature: str, answer: Mapping[str, Array], expected: Neighbors, queries: Array, metric: str
) -> float:
    """Return the largest difference of the scores from those expected, as a share.

    Ids may change places where their scores are as near as the tolerance of the largest. A squared
    distance is a difference of squared lengths: its rounding is that of the query's own length.

    Raises:
        ExportError: If scores or ids differ.
    """
    largest = np.abs(expected.scores).max(axis=1, keepdims=True)
    if metric == "l2":
        largest = np.maximum(largest, np.square(queries).sum(axis=1, keepdims=True))
    share = equal_rows(signature, answer["scores"], expected.scores, largest)
    apart = np.diff(expected.scores, axis=1)
    least = TOLERANCE * largest
    far = np.pad(np.abs(apart) > least, ((0, 0), (1, 1)), constant_values=True)
    alone = far[:, :-1] & far[:, 1:]
    alone[:, -1] = False  # a row that is as near may have been left out
    if (answer["ids"] != expected.ids)[alone].any():
        raise differs(signature, "it finds other neighbours")
    return share


def exact_neighbors(
    index: ExactIndex, queries: Array, dims: Collection[int]
) -> dict[int, Neighbors]:
    """Return the nearest of all rows at each of some dims, counted in float64.

    The gallery is read once, a part of its rows at a time.

    Args:
        index: The gallery, whose metric and `k` count.
        queries: `(rows, width)`.
        dims: None wider than the gallery.
    """
    if not dims:
        return {}
    edges = [0, *sorted({*dims, *(end for end in index.schedule.dims if end < max(dims))})]
    queries = queries.astype(np.float64)
    best = {dim: Neighbors(*_none(len(queries))) for dim in sorted(dims)}
    for first in range(0, len(index), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        ids = np.broadcast_to(index.ids[part], (len(queries), len(index.ids[part])))
        dots, squares = np.zeros(ids.shape), np.zeros(ids.shape[1])
        for start, stop in pairwise(edges):
            rows = columns(index, start, stop)[part].astype(np.float64)
            dots += queries[:, start:stop] @ rows.T
            squares += np.square(rows).sum(axis=1)
            if stop in best:
                lengths = np.square(queries[:, :stop]).sum(axis=1, keepdims=True)
                scores = _scores(index.metric, dots, squares, lengths)
                best[stop] = _better(best[stop], ids, scores, index.schedule.k)
        for block in index.blocks:
            forget(block)
    return best


def columns(index: ExactIndex, start: int, stop: int) -> Array:
    """Return columns of the gallery that lie in one block of it, as a view."""
    ends = index.schedule.dims
    number = next(number for number, end in enumerate(ends) if stop <= end)
    before = (0, *ends)[number]
    block: Array = index.blocks[number]
    return block[:, start - before : stop - before]


def _none(queries: int) -> tuple[Array, Array]:
    return np.empty((queries, 0), np.int64), np.empty((queries, 0))


def _better(best: Neighbors, ids: Array, scores: Array, k: int) -> Neighbors:
    """The `k` best of those so far and of some more rows."""
    if k < scores.shape[1]:
        found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        ids, scores = (np.take_along_axis(array, found, axis=1) for array in (ids, scores))
    ids, scores = (np.concatenate(pair, 1) for pair in ((best.ids, ids), (best.scores, scores)))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def _scores(metric: str, dots: Array, squares: Array, lengths: Array) -> Array:
    if metric == "l2":
        return np.minimum(2 * dots - squares - lengths, 0)
    if metric == "cosine":
        return dots / np.sqrt(np.maximum(squares, MIN_SQUARE) * np.maximum(lengths, MIN_SQUARE))
    return dots.copy()
